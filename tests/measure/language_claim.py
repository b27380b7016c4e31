"""Does entropy minimisation on a stream of one class of answers end in one string, and does ZeroSiam's not?

Arithmetic prompts whose answers all begin with the same digit go through each method: the net answers a batch, then
the method adapts on what the net wrote. The table has the accuracy of the stream; of its last quarter the accuracy, the
entropy of the tokens, the share of the most frequent answer and the norm of the logits; and the accuracy on prompts of
all classes afterwards, without adapting: means over seeds [lowest, highest]. `--stream iid` and `sorted` take all
classes, shuffled or one after the other. With the source's weights it takes `lightning-tta fit --config
configs/language/source.yaml` first.

    python tests/measure/language_claim.py --source runs/language/source --rates 1e-4 1e-3 1e-2 --seeds 3
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_tta import PromptData, adapt
from lightning_tta.backbones.gpt import create_gpt
from lightning_tta.data.text.checkers import is_correct
from lightning_tta.modules.loading import load_source
from lightning_tta.run.answers import token_measures
from plumbing import arguments, header, row

METHODS: dict[str, Callable[[float], tuple[str, dict[str, Any]]]] = {
    "source": lambda rate: ("source", {}),
    "tent": lambda rate: ("tent", {"lr": rate}),
    "come": lambda rate: ("come", {"lr": rate}),
    "random predictor": lambda rate: ("zerosiam", {"lr": rate, "predictor_lr": rate, "predictor": "random"}),
    "zerosiam": lambda rate: ("zerosiam", {"lr": rate, "predictor_lr": 4 * rate}),
    "zerosiam, predictor at the same rate": lambda rate: ("zerosiam", {"lr": rate, "predictor_lr": rate}),
}
CLAIM = list(METHODS)
METHODS |= {  # by the prompt's own tokens, and by the logits of each new one
    "tlm": lambda rate: ("tlm", {"lr": rate}),
    "tlm, every prompt": lambda rate: ("tlm", {"lr": rate, "threshold": 0.0}),
    "slot": lambda rate: ("slot", {"lr": rate}),
    "em_inf": lambda rate: ("em_inf", {"lr": rate}),
}
"""Name and options of a method at a rate; by default ZeroSiam's predictor has four times the rate of the net."""
NAMES = ("accuracy", "entropy", "share", "norm")


def data_of(args: Any, seed: int, **options: Any) -> PromptData:
    """The stream of a seed."""
    kind = {"one_class": "iid", "iid": "iid", "sorted": "label_shift"}[args.stream]
    classes = [args.answers] if args.stream == "one_class" else None
    rest: dict[str, Any] = {"stream": kind, "classes": classes, "num_prompts": args.prompts, **options}
    return PromptData(domains=[args.domain], batch_size=args.batch_size, order_seed=seed, **rest)


def answered(
    method: Any, batch: dict[str, Any], data: PromptData, **how: Any
) -> tuple[dict[str, torch.Tensor], list[str], list[int]]:
    """The batch with answers, their texts, and which are right."""
    prompts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    full = method.generate(prompts, max_new_tokens=6, stop=[data.tokenizer.eos_token_id], **how)
    rows = zip(full["input_ids"], full["generated"], strict=True)
    texts = [data.tokenizer.decode(ids[new], skip_special_tokens=True) for ids, new in rows]
    return full, texts, [int(is_correct(*each)) for each in zip(texts, batch["answer"], batch["checker"], strict=True)]


def stream(net: nn.Module, name: str, rate: float, args: Any, seed: int) -> dict[str, list[Any]]:
    """What came of each batch; at the end, of prompts of all classes."""
    kind, options = METHODS[name](rate)
    select = {} if args.select == "default" or kind == "source" else {"select": args.select}
    method, data = adapt(net, kind, **options, **select), data_of(args, seed)
    account: dict[str, list[Any]] = {key: [] for key in (*NAMES, "answers", "after", "prompt")}
    for number, batch in enumerate(data.predict_dataloader()):
        how = {"temperature": args.temperature, "seed": 1000 * seed + number}
        full, texts, right = answered(method, batch, data, **how)
        logits = method(full)
        measures = token_measures(logits, full["input_ids"], full["generated"])
        account["accuracy"] += right
        account["answers"] += texts
        account["entropy"] += measures["entropy"].tolist()
        account["norm"] += measures["norm"].tolist()
        account["prompt"].append(method.stats.get("prompt_loss", math.nan))
    every = data_of(args, 0, stream="iid", classes=None, num_prompts=min(200, args.prompts))
    account["after"] = [right for batch in every.predict_dataloader() for right in answered(method, batch, every)[2]]
    return account


def share(answers: Sequence[str]) -> float:
    """That of the most frequent answer."""
    return max(answers.count(each) for each in set(answers)) / len(answers)


def summary(account: dict[str, list[Any]]) -> dict[str, float]:
    """Means over the last quarter of a stream."""
    part = slice(-(len(account["answers"]) // 4 or 1), None)
    last = {name: sum(account[name][part]) / len(account[name][part]) for name in ("accuracy", "entropy", "norm")}
    whole = sum(account["accuracy"]) / len(account["accuracy"])
    after = sum(account["after"]) / len(account["after"])
    batches = account.get("prompt", [math.nan])
    prompt = sum(batches[-(len(batches) // 4 or 1) :]) / (len(batches) // 4 or 1)
    return {"whole": whole, **last, "share": share(account["answers"][part]), "after": after, "prompt": prompt}


def runs(args: Any) -> Iterator[tuple[str, float, int, dict[str, list[Any]]]]:
    """All of them, each read from `--keep` where it is there already."""
    net = load_source(args.source).eval() if args.source else create_gpt(layers=1, width=16, heads=2)
    kept = Path(args.keep) if args.keep else None
    for name in args.methods:
        for rate in [0.0] if name == "source" else args.rates:
            for seed in range(args.seeds):
                what = [
                    name.replace(", ", "_").replace(" ", "_"),
                    rate,
                    seed,
                    args.stream,
                    args.domain,
                    args.prompts,
                    args.batch_size,
                    args.temperature,
                ]
                file = None if kept is None else kept / f"{'-'.join(map(str, [*what, args.select]))}.json"
                if file is not None and file.exists():
                    yield name, rate, seed, json.loads(file.read_text())
                    continue
                torch.manual_seed(seed)
                account = stream(net, name, float(rate), args, seed)
                if file is not None:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(json.dumps(account))
                yield name, rate, seed, account


def draw(accounts: dict[str, list[dict[str, list[Any]]]], path: str) -> None:
    """Four measures over the stream, mean over seeds, smoothed over 64 prompts."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 4, figsize=(15, 3.4), layout="constrained")
    titles = ("accuracy", "entropy of tokens, nats", "share of the most frequent answer", "norm of logits")
    for panel, name, title in zip(panels, NAMES, titles, strict=True):
        for label, several in accounts.items():
            curves = []
            for account in several:
                ends = range(64, len(account["answers"]) + 1, 16)
                values = account["answers" if name == "share" else name]
                parts = [values[end - 64 : end] for end in ends]
                curves.append([share(part) if name == "share" else sum(part) / 64 for part in parts])
            panel.plot([*ends], torch.tensor(curves, dtype=torch.float64).mean(0), label=label, lw=1.4)
        panel.set(title=title, xlabel="prompts")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(args: Sequence[str] | None = None) -> None:
    """Print the table."""
    options = arguments(
        __doc__,
        args,
        source=("", "checkpoint of a language model; by default a random one"),
        methods=CLAIM,
        rates=["1e-4", "3e-4", "1e-3", "3e-3", "1e-2"],
        seeds=(3, "orders of the stream"),
        stream=("one_class", "one_class, iid or sorted"),
        answers=("1", "how the answers of the one class begin"),
        domain=("source", "a domain of arithmetic, such as spaces@2"),
        prompts=(1600, "of a stream"),
        batch_size=(8, "prompts a step"),
        temperature=(0.0, "of the draw of answers; 0: the likeliest token"),
        select=("default", "default (LoRA on query and value), norm, all"),
        prompt_loss=(
            False,
            "a column more: cross-entropy of the prompts in the last quarter, of tlm and slot before steps",
        ),
        keep=("", "folder for what was run, to go on from"),
        figure=("", "file of a figure"),
    )
    names = ["accuracy %", "last quarter %", "entropy", "most frequent %", "norm", "all classes after %"]
    header("method", "rate", *names, *(["prompt loss"] if options.prompt_loss else []))
    every: dict[tuple[str, float], list[dict[str, list[Any]]]] = {}
    for name, rate, seed, account in runs(options):
        several = every.setdefault((name, rate), [])
        several.append(account)
        if seed + 1 < options.seeds:
            continue
        each = [summary(account) for account in several]

        def cell(key: str, scale: float, digits: int, each: list[dict[str, float]] = each) -> str:
            values = [scale * one[key] for one in each]
            mean = f"{sum(values) / len(values):.{digits}f}"
            return mean if len(values) == 1 else f"{mean} [{min(values):.{digits}f}, {max(values):.{digits}f}]"

        numbers = (("whole", 100, 1), ("accuracy", 100, 1), ("entropy", 1, 3), ("share", 100, 1), ("norm", 1, 1))
        more = [("prompt", 1, 3)] if options.prompt_loss else []
        row(name, rate or "-", *(cell(*number) for number in (*numbers, ("after", 100, 1), *more)))
    if options.figure:
        rate = options.rates[-1]
        draw({name: several for (name, r), several in every.items() if r in (0.0, rate)}, options.figure)


if __name__ == "__main__":
    main(sys.argv[1:])
