"""How well the chooser chooses: every candidate to the end of each of a grid of streams, then rules replayed on them.

    python tests/measure/choices.py --root ROOT --bn resnet20.safetensors --gn resnet26_gn.safetensors \
        --mnist mnist_uint8.npz --keep FOLDER
    python tests/measure/choices.py --keep FOLDER      # the digits alone

Two data sets (MNIST or the digits; CIFAR-10 images), two nets each (BatchNorm, GroupNorm), five streams (iid,
continual, correlated, mixed, imbalanced), five settings: for continual and mixed four of five held-out corruptions and
clean images in another order, else one of the five. The rule was designed on MNIST; CIFAR-10 tests it. What was run is
in FOLDER, one file a stream; a second call goes on, and replays.
"""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tta import ArrayData, DigitsData, FolderData, ShiftedDataModule, choose, create_backbone
from lightning_tta.choosing.candidates import SOURCE, read_candidates
from lightning_tta.choosing.rule import decide, gains
from lightning_tta.choosing.scores import score
from lightning_tta.choosing.trial import Record, Runner, finish
from plumbing import arguments, header, row

IMBALANCED = "imbalanced"
STREAMS = ["iid", "continual", "correlated", "mixed", IMBALANCED]
CIFAR = ["clean", "speckle_noise", "gaussian_blur", "spatter", "saturate"]
DIGITS = ["clean", "speckle_noise", "gaussian_blur", "shear", "occlusion"]
NO_LABELS = "no label"
TRIAL: int = inspect.signature(choose).parameters["batches"].default
FRONTIER = (0.5, 0.6, 0.7, 0.8, 0.85, 0.95)
"""Probabilities of a gain from which a candidate might be taken, beside the rule's own."""
SURE = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
"""Bounds of the groups in which probabilities are compared with how often they come true."""
Results = dict[str, dict[str, dict[str, float]]]
"""By data set and policy: accuracy, regret, and the other columns."""
SMALL_NETS = {"bn": "timm/test_resnet", "gn": "timm/test_efficientnet_gn"}
CIFAR_NETS = {"bn": "cifar/resnet20", "gn": "cifar/resnet26_gn"}


class Case(NamedTuple):
    """A stream for a net."""

    data: str
    net: str
    stream: str
    setting: int

    @property
    def name(self) -> str:
        """Of its file."""
        return "-".join(map(str, self))


def cases(options: Any) -> Iterator[Case]:
    """All of the grid, or a half of it, by turns: the first so many have as many of each stream, setting and net."""
    for turn in range(options.settings):
        for number, stream in enumerate(options.streams):
            setting = (number + turn) % options.settings
            if options.half < 0 or (number + setting) % 2 == options.half:
                yield from (Case(data, net, stream, setting) for data in options.data for net in options.nets)


def make_data(case: Case, options: Any) -> ShiftedDataModule:
    """The stream's data module."""
    names = options.domains or (CIFAR if case.data == "cifar" else DIGITS)
    single = case.stream not in ("continual", "mixed")
    turned = [*names[case.setting :], *names[: case.setting]]
    common: dict[str, Any] = {
        "domains": turned[:1] if single else turned[1:],
        "stream": case.stream,
        "order_seed": options.order + case.setting,
        "num_images": options.images if single else options.images * 5 // 16,
        "batch_size": options.batch,
        "cache_dir": str(Path(options.keep) / "images"),
    }
    if case.stream == IMBALANCED:  # ends at the first class that has no image left
        common |= {"stream": "markov", "class_correlation": 0.0, "class_imbalance": 10.0, "domain_correlation": 1.0}
        common["num_images"] = options.images * 5 // 2
    data: ShiftedDataModule
    if case.data == "cifar":
        data = FolderData(options.root, function_set="imagenet_c", severity=1, **common)
    elif options.mnist:
        data = ArrayData(options.mnist, num_train=options.train, severity=5, **common)
    else:
        data = DigitsData(severity=5, **common)
    data.prepare_data()
    data.setup("predict")
    return data


def make_net(case: Case, options: Any) -> nn.Module:
    """The source net: of a file, or trained here on clean images and kept."""
    if case.data == "cifar":
        net = create_backbone(CIFAR_NETS[case.net], 10, weights=getattr(options, case.net)).eval()
        return net.to(memory_format=torch.channels_last) if case.net == "bn" else net  # a fourth less time on a CPU
    path = Path(options.keep) / f"{case.data}-{case.net}.pt"
    torch.manual_seed(0)
    net = create_backbone(SMALL_NETS[case.net], 10)
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval()
    data = make_data(case, options)
    data.setup("fit")
    loader = data.train_dataloader()
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    net.train()
    for _ in range(options.epochs):
        for batch in loader:
            optimizer.zero_grad()
            F.cross_entropy(net(batch["image"]), batch["label"]).backward()
            optimizer.step()
        schedule.step()
    torch.save(net.state_dict(), path)
    return net.eval()


def run(case: Case, options: Any) -> dict[str, Any]:
    """Every candidate: its record after the trial, and its logits to the end."""
    data, net = make_data(case, options), make_net(case, options)
    batches = list(data.predict_dataloader())
    images = [batch["image"] for batch in batches]
    found: dict[str, Any] = {}
    runners = [Runner(candidate, net) for candidate in read_candidates("default", net, options.batch)]
    records: dict[int, dict[str, Record]] = {}
    passes: dict[str, int] = {}
    for number, batch in enumerate(images, 1):
        for runner in runners:
            runner(batch)
        if number == options.trial or (number in options.longer and number > options.trial):
            records[number] = finish(runners, images[:number])
            passes = passes or {runner.candidate.name: runner.passes for runner in runners}
    for runner in runners:
        record = records[options.trial].get(runner.candidate.name)
        longer = {
            n: each[runner.candidate.name]
            for n, each in records.items()
            if runner.candidate.name in each and n > options.trial
        }
        found[runner.candidate.name] = {
            "problem": runner.problem,
            "passes": passes[runner.candidate.name],
            "record": None if record is None else vars(record),
            "longer": {number: vars(each) for number, each in longer.items()},
            "logits": torch.cat(runner.answers) if not runner.problem else None,
        }
        runner.release()
    return {
        "labels": torch.cat([batch["label"] for batch in batches]),
        "sizes": [*map(len, images)],
        "candidates": found,
    }


def scored(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Scores of every candidate that could run, by name."""
    records = {name: Record(**each["record"]) for name, each in found["candidates"].items() if each["record"]}
    return {name: score(record, records[SOURCE]) for name, record in records.items()}


def accuracies(found: dict[str, Any]) -> dict[str, float]:
    """Percent right of each candidate over the whole stream."""
    return {
        name: 100 * float((each["logits"].argmax(1) == found["labels"]).float().mean())
        for name, each in found["candidates"].items()
        if each["logits"] is not None
    }


def with_labels(
    scores: dict[str, dict[str, float]], found: dict[str, Any], chosen: Tensor
) -> dict[str, dict[str, float]]:
    """The scores, with what the labels of some images of the trial say."""
    truth = found["labels"][chosen]
    answers = {name: found["candidates"][name]["record"]["answers"][chosen].argmax(1) for name in scores}
    right = {name: each == truth for name, each in answers.items()}
    return {
        name: {
            **own,
            "labels": float(right[name].double().mean()),
            "labels_won": float((right[name] & ~right[SOURCE]).double().mean()),
            "labels_lost": float((right[SOURCE] & ~right[name]).double().mean()),
        }
        for name, own in scores.items()
    }


def highest(scores: dict[str, dict[str, float]], name: str) -> str:
    """The candidate with the highest of one score, the first of several."""
    return max(scores, key=lambda each: scores[each].get(name, 0))


def dawid_skene(answers: Tensor, classes: int, rounds: int = 50) -> Tensor:
    """Accuracy of each of C classifiers from their answers (C, N) alone, by expectation maximization; (C,), float64.

    Each is right with its own probability, and wrong alike in all other classes, whatever the others say; classes have
    shares of their own. Starts at the vote. Source: Dawid and Skene, 1979, with one number a classifier.
    """
    votes = F.one_hot(answers, classes).double()
    belief = votes.mean(0)
    for _ in range(rounds):
        right = ((votes * belief).sum((1, 2)) + 0.5) / (answers.shape[1] + 1)
        shares = (belief.sum(0) + 1) / (len(belief) + classes)
        yes, no = right.log(), ((1 - right) / (classes - 1)).log()
        odds = shares.log() + (votes * yes[:, None, None] + (1 - votes) * no[:, None, None]).sum(0)
        belief = odds.softmax(-1)
    return (votes * belief).mean(1).sum(-1)


def consensus(found: dict[str, Any]) -> str:
    """The candidate that agrees most with all, in the sense of :func:`dawid_skene`; the first of several."""
    records = {name: each["record"]["answers"] for name, each in found["candidates"].items() if each["record"]}
    names = list(records)
    answers = torch.stack([records[name].argmax(1) for name in names])
    accuracy = dawid_skene(answers, records[SOURCE].shape[1])
    return names[int(accuracy.argmax())]


def most_right(found: dict[str, Any], images: int) -> list[str]:
    """Who has most right answers on the first images: what no choice from them can be better than, on average."""
    truth = found["labels"][:images]
    right = {
        name: int((each["logits"][:images].argmax(1) == truth).sum())
        for name, each in found["candidates"].items()
        if each["logits"] is not None
    }
    return [name for name in right if right[name] == max(right.values())]


def picks(found: dict[str, Any], counts: list[int], draws: int) -> dict[str, list[str]]:
    """What each policy takes on a stream: with so many labels, once a draw of the labels."""
    scores = scored(found)
    taken = {f"chooser, {NO_LABELS}": [decide(scores).name]}
    taken |= {f"chooser at {at}": [decide(scores, clear_at=at).name] for at in FRONTIER}
    images = len(found["candidates"][SOURCE]["record"]["answers"])
    for count in counts:
        orders = [torch.randperm(images, generator=torch.Generator().manual_seed(seed)) for seed in range(draws)]
        told = [with_labels(scores, found, order[:count]) for order in orders]
        taken[f"chooser, {count} labels"] = [decide(each, count).name for each in told]
        taken[f"most right of {count} labels"] = [highest(each, "labels") for each in told]
    for name in ("aetta", "infomax", "snd", "entropy", "agreement_view"):
        taken[f"highest {name}"] = [highest(scores, name)]
    taken |= {"consensus": [consensus(found)], "most right of the trial": most_right(found, images)}
    return {**taken, "always zerosiam": ["zerosiam"], "always source": [SOURCE], "random": list(scores)}


def outcome(right: dict[str, float], names: list[str]) -> dict[str, float]:
    """Of what a policy takes on a stream, the means over its draws; numbers in percent or points."""
    mine = torch.tensor([right[name] for name in names], dtype=torch.float64)
    lost = right[SOURCE] - mine
    return {
        "accuracy": float(mine.mean()),
        "regret": max(right.values()) - float(mine.mean()),
        "worse": 100 * float((lost > 1e-6).double().mean()),
        "worse_by_a_point": 100 * float((lost > 1).double().mean()),
        "source": 100 * sum(name == SOURCE for name in names) / len(names),
    }


def by_batches(kept: list[dict[str, Any]]) -> list[tuple[int, int, float, float | None, float | None]]:
    """Regret by the length of the trial, over the streams that are longer.

    Batches; streams; mean regret of who is most right in the trial; and where it was recorded, of the chooser, and in
    percent, how often it takes one that is worse than the source.
    """
    rows = []
    for number in range(1, max(len(found["sizes"]) for found in kept)):
        longer = [found for found in kept if len(found["sizes"]) > number]
        best, chosen = [], []
        for found in longer:
            right, images = accuracies(found), sum(found["sizes"][:number])
            best.append(outcome(right, most_right(found, images))["regret"])
            short = at_length(found, images)
            if short:
                chosen.append(outcome(right, [decide(scored(short)).name]))
        means = [sum(each[name] for each in chosen) / len(chosen) for name in ("regret", "worse")] if chosen else []
        regret, worse = means if len(chosen) == len(longer) else (None, None)
        rows.append((number, len(longer), sum(best) / len(best), regret, worse))
    return rows


def at_length(found: dict[str, Any], images: int) -> dict[str, Any] | None:
    """The same with the records of a trial of so many images, if there are some."""
    candidates = {}
    for name, each in found["candidates"].items():
        records = [each["record"], *each.get("longer", {}).values()]
        record = next((record for record in records if record and len(record["answers"]) == images), None)
        candidates[name] = {**each, "record": record}
    return {**found, "candidates": candidates} if candidates[SOURCE]["record"] else None


def reliability(kept: list[dict[str, Any]]) -> list[tuple[float, float, int, float, float]]:
    """Of all candidates that ever differ from the source: probabilities of a gain, and how often there is one.

    Each group's bounds, its number of candidates, its mean probability, and the share that is better than the source.
    """
    pairs = []
    for found in kept:
        scores, right = scored(found), accuracies(found)
        for name, gain in gains(scores).items():
            if scores[name]["agreement_source"] < 1 and right[name] != right[SOURCE]:
                pairs.append((gain.probability, float(right[name] > right[SOURCE])))
    groups = []
    for low, high in itertools.pairwise(SURE):
        inside = [pair for pair in pairs if low <= pair[0] < high or pair[0] == high == 1]
        if inside:
            means = (sum(column) / len(inside) for column in zip(*inside, strict=True))
            groups.append((low, high, len(inside), *means))
    return groups


def replay(folder: Path, options: Any) -> Results:
    """Tables of each data set: policies by accuracy, regret, and how often they lose to the source; each stream."""
    results: Results = {}
    for data in options.data:
        kept = [case for case in cases(options) if case.data == data and (folder / f"{case.name}.pt").exists()]
        outcomes: dict[str, list[dict[str, float]]] = {}
        streams: list[tuple[object, ...]] = []
        whole: list[dict[str, Any]] = []
        for case in sorted(kept):
            found = torch.load(folder / f"{case.name}.pt", weights_only=True)
            whole.append(found)
            right, taken = accuracies(found), picks(found, options.labels, options.draws)
            for policy, names in taken.items():
                outcomes.setdefault(policy, []).append(outcome(right, names))
            (mine,), best = taken[f"chooser, {NO_LABELS}"], max(right, key=lambda name: right[name])
            numbers = [f"{right[name]:.1f}" for name in (SOURCE, "zerosiam", best, mine)]
            streams.append((case.name, *numbers, best, mine))
        if not kept:
            continue
        print(f"\n{data}: {len(kept)} streams\n")
        header("policy", "accuracy", "regret", "largest", "worse than source, %", "by over a point, %", "source, %")
        results[data] = {}
        for policy, each in outcomes.items():
            means = {name: sum(one[name] for one in each) / len(each) for name in each[0]}
            results[data][policy] = {**means, "largest": max(one["regret"] for one in each)}
            order = ("accuracy", "regret", "largest", "worse", "worse_by_a_point", "source")
            row(policy, *(f"{results[data][policy][name]:.1f}" for name in order))
        print()
        header("stream", "source", "zerosiam", "best", "chosen", "which is best", "which is chosen")
        for each_stream in streams:
            row(*each_stream)
        print()
        header("probability of a gain", "candidates", "mean probability", "better than the source")
        for low, high, number, mean, share in reliability(whole):
            row(f"{low} to {high}", number, f"{mean:.2f}", f"{share:.2f}")
        print()
        header("batches of the trial", "streams", "regret of the most right", "of the chooser", "worse, %")
        for number, streams_so_long, best_regret, *ours in by_batches(whole):
            row(
                number, streams_so_long, f"{best_regret:.2f}", *("" if each is None else f"{each:.2f}" for each in ours)
            )
    return results


def main(args: list[str] | None = None) -> Results:
    """Run what is missing, and print the tables; returns them, by data set and policy."""
    options = arguments(
        __doc__,
        args,
        keep=("runs/choices", "folder of what was run"),
        root=("", "of CIFAR-10 images, ROOT/test/<class>/*"),
        bn=("", "weights of cifar/resnet20"),
        gn=("", "weights of cifar/resnet26_gn"),
        mnist=("", "npz file of MNIST; without: the digits"),
        data=["digits", "cifar"],
        nets=["bn", "gn"],
        streams=STREAMS,
        settings=5,
        images=(400, "of a stream of one domain; of four domains 5/16 of it each"),
        batch=50,
        trial=(TRIAL, "batches that the chooser sees"),
        longer=([""], "more such numbers, to be replayed"),
        domains=([""], "five, in place of the held-out ones"),
        order=(0, "added to the seed of each order"),
        train=(3000, "training images of MNIST"),
        epochs=8,
        labels=["10", "50", "100"],
        draws=(20, "of the labels"),
        half=(-1, "replay only the first (0) or the second half (1) of the grid"),
        replay=(False, "run nothing"),
    )
    options.labels = [int(count) for count in options.labels]
    options.longer = [int(number) for number in options.longer if number]
    options.domains = [name for name in options.domains if name]
    torch.set_num_threads(1)
    Path(options.keep).mkdir(parents=True, exist_ok=True)
    for case in cases(options):
        path = Path(options.keep) / f"{case.name}.pt"
        if options.replay or path.exists() or (case.data == "cifar" and not options.root):
            continue
        start = time.perf_counter()
        found = run(case, options)
        torch.save(found, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
        right = {name: round(value, 1) for name, value in accuracies(found).items()}
        problems = {name: each["problem"] for name, each in found["candidates"].items() if each["problem"]}
        print(f"{case.name} {time.perf_counter() - start:.0f} s", right, problems or "", flush=True)
    return replay(Path(options.keep), options)


if __name__ == "__main__":
    main()
