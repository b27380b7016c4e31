"""Estimates of accuracy beside the truth, along streams: methods that do well, and methods that collapse.

    python tests/measure/estimates.py --root ROOT --bn resnet20.safetensors --gn resnet26_gn.safetensors --keep FOLDER

CIFAR-10 images: ImageNet-C's functions at severity 1; without a root the digits at severity 5, and nets of one's own.
First table, a row a run: mean accuracy, and of each estimator the mean absolute difference, in points, between its
estimate at the end of a window of batches and the share of right answers in the window. Second table: means over
groups of runs. Third: what a batch of 200 costs, without passes. The source's held-out images are clean test images
that are in no stream. What was run is in FOLDER, a file a run; a second call goes on, and replays.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from lightning_tta import adapt
from lightning_tta.backbones import create_backbone
from lightning_tta.backbones.norms import batch_norm_layers
from lightning_tta.backbones.split import HeadSplit, recorded_calls
from lightning_tta.evidence.accuracy import CONSENSUS, consensus_accuracy, log_odds
from lightning_tta.guard.monitors.base import Monitor, Seen
from lightning_tta.guard.monitors.consensus import Consensus
from lightning_tta.guard.monitors.kinds import make_monitors
from plumbing import arguments, digits_or_folder, header, medians, row, take_turns

STREAMS = ["iid", "continual", "correlated", "mixed"]
DOMAINS = ["gaussian_noise", "fog", "contrast", "jpeg_compression"]
COLLAPSES = {f"tent x{factor}": ("tent", {"lr": factor * 1e-3}) for factor in (30, 100)}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("source", "tent", "zerosiam", "eata", "sar", "rotta")},
    **COLLAPSES,
}
ESTIMATORS = ["consensus", "aetta", "atc", "doc", "confidence", "source_agreement", "view_agreement"]
Rows = list[dict[str, Any]]  # of a run, a batch each


def source_logits(net: nn.Module, batches: Rows) -> list[tuple[Tensor, Tensor]]:
    """Of each batch the source's logits with its own statistics, and with the batch's."""
    norm: Callable[[Tensor], Tensor] | None = adapt(net, "norm") if batch_norm_layers(net) else None
    with torch.no_grad():
        own = [net(batch["image"]) for batch in batches]
    return [(u, norm(batch["image"]) if norm else u) for u, batch in zip(own, batches, strict=True)]


def record(
    net: nn.Module, method_name: str, batches: Rows, sources: list[tuple[Tensor, Tensor]], data: Any, stream: str = ""
) -> Rows:
    """A run: of each batch what there is to see. An iid stream begins anew at each domain."""
    name, options = METHODS[method_name]
    torch.manual_seed(0)
    method = adapt(net, name, **options)
    if not method.prepared:
        method.prepare(data.source_batches(1000))
    split, rows, last = HeadSplit(method.model), Rows(), 0
    for batch, (source, same) in zip(batches, sources, strict=True):
        domain = int(batch["domain"][0])
        if stream == "iid" and domain != last:
            method.reset()
        last = domain
        with recorded_calls({split.name: split.head}) as calls:
            logits = method(batch["image"])
        (features, *_) = next(call[1] for call in reversed(calls) if torch.equal(call[2].detach(), logits))
        rows.append(
            {
                "logits": logits,
                "label": batch["label"],
                "source": source,
                "same": same,
                "mirror": method.predict(batch["image"].flip(-1), statistics="batch"),
                "features": features.detach().clone(),
                "weight": split.head.weight.detach().clone(),
                "bias": split.head.bias.detach().clone(),
            }
        )
    return rows


def seen_of(rows: Rows) -> Iterator[Seen]:
    """What monitors see of a run."""
    for each in rows:
        head = nn.Linear(*reversed(each["weight"].shape))
        head.load_state_dict({"weight": each["weight"], "bias": each["bias"]})
        yield Seen(
            each["logits"],
            source=each["source"],
            same_source=each["same"],
            features=each["features"],
            head=head,
            predict=lambda images, each=each: each["mirror"],
            images=torch.zeros(1, 1, 1, 1),
            labels=each["label"],
        )


def save(rows: Rows, path: Path | None) -> None:
    """Keep a run, where there is a folder for it."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(rows, path)


def held_out(make: Callable[..., Any], images: int, number: int, batch: int) -> Rows:
    """Batches of ``number`` clean test images that are none of the first ``images``, of which the streams are made."""
    few, many = (
        [b for b in make(domains=["clean"], num_images=n, stream="iid").predict_dataloader()]
        for n in (images, images + number)
    )
    used = {image.numpy().tobytes() for b in few for image in b["image"]}
    x, y = (torch.cat([b[name] for b in many]) for name in ("image", "label"))
    free = torch.tensor([image.numpy().tobytes() not in used for image in x])
    x, y, domain = x[free], y[free], torch.zeros(int(free.sum()), dtype=torch.int64)
    parts = (t.split(batch) for t in (x, y, domain))
    return [{"image": a, "label": b, "domain": c} for a, b, c in zip(*parts, strict=True)]


def differences(
    rows: Rows, monitors: dict[str, Monitor], window: int, fit: Points
) -> tuple[dict[str, float], list[int]]:
    """Mean absolute differences in points over the windows of a run; batches in which AETTA raises its alarm."""
    points: dict[str, list[float]] = defaultdict(list)
    right: list[float] = []
    alarms = []
    for monitor in monitors.values():
        monitor.begin()
    for number, (each, seen) in enumerate(zip(rows, seen_of(rows), strict=True), 1):
        right.append(float((each["logits"].argmax(1) == each["label"]).double().mean()))
        for name, monitor in monitors.items():
            monitor.see(seen)
            if name == "aetta" and monitor.alarm():
                alarms.append(number)
            if number % window == 0:
                estimate = monitor.estimate()
                assert estimate is not None
                points[name].append(100 * abs(estimate - mean(right[-window:])))
                if isinstance(monitor, Consensus):
                    fit.append(terms(monitor, mean(right[-window:])))
    return {name: mean(values) for name, values in points.items()}, alarms


Points = list[tuple[list[float], float]]  # of windows: four terms in log odds, and what they are to give


def terms(monitor: Consensus, accuracy: float) -> tuple[list[float], float]:
    """What the weights of the monitor ``consensus`` multiply by now, and the log odds that are to come out."""
    assert monitor.sums is not None
    means, anchor = (monitor.sums / monitor.weight).tolist(), monitor.anchor
    known = [log_odds(means[i]) - log_odds(anchor[name]) for i, name in enumerate(list(CONSENSUS)[:3])]
    with_one = {name: float(name == "evenness") for name in CONSENSUS}
    with patch.dict(CONSENSUS, with_one):
        evenness = consensus_accuracy(means, anchor)
    last = math.log(evenness / (1 - evenness)) - log_odds(anchor["accuracy"])
    return [*known, last], log_odds(accuracy) - log_odds(anchor["accuracy"])


def fitted(points: Points) -> dict[str, float]:
    """Weights of least squares, with a small ridge."""
    x, y = torch.tensor([p for p, _ in points]).double(), torch.tensor([q for _, q in points]).double()
    ridge = 2e-3 * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    return dict(zip(CONSENSUS, torch.linalg.solve(x.T @ x + ridge, x.T @ y).tolist(), strict=True))


def main(args: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Run what is missing and print the tables; returns the second, by estimator and group."""
    options = arguments(
        __doc__,
        args,
        root="",
        bn=("", "weights of a net with BatchNorm"),
        gn=("", "weights of a net with GroupNorm"),
        net_bn="cifar/resnet20",
        net_gn="cifar/resnet26_gn",
        domains=DOMAINS,
        streams=STREAMS,
        methods=list(METHODS),
        function_set="imagenet_c",
        images=(500, "of each domain"),
        source_images=1500,
        batch=100,
        window=(4, "batches"),
        keep=("", "folder of runs"),
        fit=(False, "also print the weights of 'consensus' that fit these runs best"),
        replay=(False, "only the runs that are in the folder"),
    )
    keep = Path(options.keep) if options.keep else None

    def make(**more: Any) -> Any:
        given = {"domains": options.domains, "num_images": options.images, "batch_size": options.batch, **more}
        return digits_or_folder(options.root, {}, {"function_set": options.function_set}, **given)

    results: dict[tuple[str, str, str], dict[str, float]] = {}
    alarms: dict[tuple[str, str, str], list[int]] = {}
    points = Points()
    columns = ["accuracy", *ESTIMATORS, "constant"]
    header("run", *columns, "first alarm of AETTA")
    for kind in ("bn", "gn"):
        if not getattr(options, kind):
            continue
        net = create_backbone(getattr(options, f"net_{kind}"), 10, weights=getattr(options, kind)).eval()
        path = keep / f"{kind}.source_images.pt" if keep else None
        if path and path.exists():
            clean_rows = torch.load(path)
        else:
            clean = held_out(make, options.images, options.source_images, options.batch)
            clean_rows = record(net, "source", clean, source_logits(net, clean), None)
            save(clean_rows, path)
        prepared = list(seen_of(clean_rows))
        aetta = {"kind": "aetta", "images": min(64, options.batch)}
        wanted = [aetta if name == "aetta" else name for name in ESTIMATORS]
        monitors = dict(zip(ESTIMATORS, make_monitors(wanted), strict=True))
        for monitor in monitors.values():
            monitor.prepare(prepared)
        constant = mean(float((seen.logits.argmax(1) == seen.labels).double().mean()) for seen in prepared)
        for stream in options.streams:
            data, batches, sources = None, Rows(), []
            for method in options.methods:
                path = keep / f"{kind}.{stream}.{method}.pt" if keep else None
                if path and path.exists():
                    rows = torch.load(path)
                elif options.replay:
                    continue
                else:
                    if data is None:
                        data = make(stream=stream, **({"dirichlet": 0.1} if stream == "correlated" else {}))
                        batches = list(data.predict_dataloader())
                        sources = source_logits(net, batches)
                    rows = record(net, method, batches, sources, data, stream)
                    save(rows, path)
                right = [float((each["logits"].argmax(1) == each["label"]).double().mean()) for each in rows]
                whole = range(options.window, len(right) + 1, options.window)  # windows, as of the estimators
                windows = [mean(right[end - options.window : end]) for end in whole]
                run = kind, stream, method
                found, alarms[run] = differences(rows, monitors, options.window, points)
                found["constant"] = mean(100 * abs(constant - accuracy) for accuracy in windows)
                results[run] = {"accuracy": 100 * mean(right), **found}
                row(" ".join(run), *(f"{results[run][name]:.1f}" for name in columns), (alarms[run] or ["-"])[0])
    healthy = [run for run in results if run[2] not in COLLAPSES]
    groups = {
        **{f"{stream}": [run for run in healthy if run[1] == stream] for stream in options.streams},
        **{f"{method}": [run for run in healthy if run[2] == method] for method in options.methods},
        "BatchNorm": [run for run in healthy if run[0] == "bn"],
        "GroupNorm": [run for run in healthy if run[0] == "gn"],
        "collapses": [run for run in results if run not in healthy],
        "all": list(results),
    }
    groups = {name: runs for name, runs in groups.items() if runs}
    table = {
        name: {group: mean(results[run][name] for run in runs) for group, runs in groups.items()}
        | {"worst run": max(each[name] for each in results.values())}
        for name in [*ESTIMATORS, "constant"]
    }
    print()
    header("estimator", *groups, "worst run")
    for name, figures in table.items():
        row(name, *(f"{figure:.1f}" for figure in figures.values()))
    if options.fit:
        print(f"\nWeights: {', '.join(f'{name} {weight:.3f}' for name, weight in fitted(points).items())}")
    large = {
        name: value if name in ("weight", "bias") else value.repeat(200, *[1] * (value.ndim - 1))[:200]
        for name, value in rows[0].items()
        if isinstance(value, Tensor)
    }
    batch = next(seen_of([large]))
    times = take_turns({name: lambda m=monitor: m.see(batch) for name, monitor in monitors.items()}, 30)
    print()
    header("estimator", "microseconds a batch of 200")
    for name, seconds in medians(times).items():
        row(name, f"{1e6 * seconds:.0f}")
    return table


if __name__ == "__main__":
    main()
