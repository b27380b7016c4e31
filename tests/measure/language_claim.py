"""Does entropy minimisation on a stream of one class of answers end in one string, and does ZeroSiam's not?

Arithmetic prompts whose answers all begin with the same digit go through each method: the net answers a batch, then
the method adapts on what the net wrote. The table has the accuracy of the stream; of its last quarter the accuracy, the
entropy of the tokens, the share of the most frequent answer and the norm of the logits; and the accuracy on prompts of
all classes afterwards, without adapting. Of one source net: means over orders of the stream [lowest, highest]. Of
several, which are trainings with other seeds: mean ± standard deviation over the nets; net n has the orders from n on.
`--stream iid` and `sorted` take all classes, shuffled or one after the other. With the source's weights it takes
`lightning-tta fit --config configs/language/source.yaml` first.

    python tests/measure/language_claim.py --source runs/language/source --rates 1e-4 1e-3 1e-2 --seeds 3
    python tests/measure/language_claim.py --source runs/seed0 runs/seed1 runs/seed2 --seeds 1 --results claim.json
    python tests/measure/language_claim.py --drawn-from claim.json --at 3e-3 1e-2 --figure claim.png
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from lightning_tta import PromptData, adapt
from lightning_tta.backbones import state_digest
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
}
CLAIM = list(METHODS)
RATIOS = {f"zerosiam, ratio {ratio:g}": ratio for ratio in (0.3, 1, 3, 10)}
"""The predictor's rate over that of the net."""
METHODS |= {
    name: lambda rate, ratio=ratio: ("zerosiam", {"lr": rate, "predictor_lr": ratio * rate})  # type: ignore[misc]
    for name, ratio in RATIOS.items()
}
METHODS |= {  # by the prompt's own tokens, and by the logits of each new one
    "tlm": lambda rate: ("tlm", {"lr": rate}),
    "tlm, every prompt": lambda rate: ("tlm", {"lr": rate, "threshold": 0.0}),
    "slot": lambda rate: ("slot", {"lr": rate}),
    "em_inf": lambda rate: ("em_inf", {"lr": rate}),
}
"""Name and options of a method at a rate; by default ZeroSiam's predictor has four times the rate of the net."""
NAMES = ("accuracy", "entropy", "share", "norm")
WINDOW, STRIDE = 64, 16  # prompts, of the curves


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


def curves(account: dict[str, list[Any]]) -> dict[str, list[float]]:
    """Each measure along the stream, over the last ``WINDOW`` prompts, every ``STRIDE`` prompts."""
    window = min(WINDOW, len(account["answers"]))
    drawn: dict[str, list[float]] = {"prompts": [*range(window, len(account["answers"]) + 1, STRIDE)]}
    for name in NAMES:
        values = account["answers" if name == "share" else name]
        parts = [values[end - window : end] for end in drawn["prompts"]]
        drawn[name] = [share(part) if name == "share" else sum(part) / window for part in parts]
    return drawn


def runs(args: Any) -> Iterator[dict[str, Any]]:
    """All of them, each read from `--keep` where it is there already: method, rate, net, and what came of it."""
    torch.manual_seed(0)  # of the random one
    nets = [load_source(path).eval() for path in args.source] or [create_gpt(layers=1, width=16, heads=2)]
    kept = Path(args.keep) if args.keep else None
    for name in args.methods:
        for rate in ["0"] if name == "source" else args.rates:
            for number, net in enumerate(nets):
                for seed in range(number, number + args.seeds):
                    stream_of = (args.stream, args.answers, args.domain, args.prompts, args.batch_size)
                    what = [name, rate, seed, *stream_of, args.temperature, args.select, state_digest(net)]
                    file = kept and kept / f"{'-'.join(map(str, what)).replace(', ', '_').replace(' ', '_')}.json"
                    if file and file.exists():
                        account = json.loads(file.read_text())
                    else:
                        torch.manual_seed(seed)
                        account = stream(net, name, float(rate), args, seed)
                        if file:
                            file.parent.mkdir(parents=True, exist_ok=True)
                            file.write_text(json.dumps(account))
                    yield {"method": name, "rate": rate, "net": number, "account": account}


def draw(results: Sequence[dict[str, Any]], rates: Sequence[str], path: str) -> None:
    """Four measures over the stream; a row for each rate, mean and standard deviation over nets and orders."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(rates), 4, figsize=(12, 2.5 * len(rates)), layout="constrained", squeeze=False)
    titles = ("accuracy", "entropy of tokens, nats", "share of most frequent answer", "norm of logits")
    colors = {label: f"C{n}" for n, label in enumerate(dict.fromkeys(each["method"] for each in results))}
    for row_of, rate in zip(axes, rates, strict=True):
        shown = [each for each in results if float(each["rate"]) in (0.0, float(rate))]
        for panel, name, title in zip(row_of, NAMES, titles, strict=True):
            for label in dict.fromkeys(each["method"] for each in shown):
                several = [each["curves"] for each in shown if each["method"] == label]
                values = torch.tensor([each[name] for each in several], dtype=torch.float64)
                mean, spread = values.mean(0), values.std(0, correction=min(1, len(values) - 1))
                panel.plot(several[0]["prompts"], mean, label=label, color=colors[label], lw=1.3)
                panel.fill_between(
                    several[0]["prompts"], mean - spread, mean + spread, color=colors[label], alpha=0.15, lw=0
                )
            panel.set_title(title, fontsize=9)
            panel.tick_params(labelsize=8)
            panel.set_ylim(bottom=0, top=1.02 if name in ("accuracy", "share") else None)
        row_of[0].set_ylabel(f"rate {rate}", fontsize=8)
    for panel in axes[-1]:
        panel.set_xlabel("prompts", fontsize=8)
    lines = {line.get_label(): line for row_of in axes for line in row_of[0].get_lines()}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=len(lines), fontsize=8, frameon=False)
    figure.savefig(path, dpi=90)
    if Path(path).suffix == ".png":  # a third of the size
        Image.open(path).convert("RGB").quantize(96).save(path, optimize=True)


def cell(each: Sequence[dict[str, float]], nets: Sequence[int], key: str, scale: float, digits: int) -> str:
    """A measure of the runs of a method: over nets mean ± standard deviation, of one net mean [lowest, highest]."""
    values = [scale * one[key] for one in each]
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(set(nets)) > 1:
        means = [statistics.fmean(v for v, n in zip(values, nets, strict=True) if n == net) for net in sorted({*nets})]
        return f"{mean} ± {statistics.stdev(means):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def main(args: Sequence[str] | None = None) -> None:
    """Print the table."""
    options = arguments(
        __doc__,
        args,
        source=([], "checkpoints of language models; by default a random one"),
        methods=CLAIM,
        rates=["1e-4", "3e-4", "1e-3", "3e-3", "1e-2"],
        seeds=(3, "orders of the stream, of each net"),
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
        results=("", "file for the summaries and curves of all runs, JSON"),
        drawn_from=("", "such a file, to draw the figure from: nothing is run"),
        figure=("", "file of a figure"),
        at=([], "rates in it; by default the last one"),
    )
    if options.drawn_from:
        results = json.loads(Path(options.drawn_from).read_text())["runs"]
    else:
        results = table(options)
    if options.results:
        settings = {k: v for k, v in vars(options).items() if k in ("stream", "domain", "answers", "prompts", "seeds")}
        Path(options.results).write_text(json.dumps({**settings, "runs": results}))
    if options.figure:
        draw(results, options.at or [str(results[-1]["rate"])], options.figure)


def table(options: Any) -> list[dict[str, Any]]:
    """Run everything, print a line for each method and rate; returns summary and curves of each run."""
    names = ["accuracy %", "last quarter %", "entropy", "most frequent %", "norm", "all classes after %"]
    header("method", "rate", *names, *(["prompt loss"] if options.prompt_loss else []))
    numbers = [("whole", 100, 1), ("accuracy", 100, 1), ("entropy", 1, 3), ("share", 100, 1), ("norm", 1, 1)]
    numbers += [("after", 100, 1), *([("prompt", 1, 3)] if options.prompt_loss else [])]
    results = list[dict[str, Any]]()
    for (name, rate), several in itertools.groupby(runs(options), lambda run: (run["method"], run["rate"])):
        each = [
            {"method": name, "rate": rate, "net": run["net"], "curves": curves(run["account"])}
            | {"summary": summary(run["account"])}
            for run in several
        ]
        nets, measures = [run["net"] for run in each], [run["summary"] for run in each]
        row(name, "-" if rate == "0" else rate, *(cell(measures, nets, *number) for number in numbers))
        results += each
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
