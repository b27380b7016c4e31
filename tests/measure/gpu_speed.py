"""Time and memory: the sections tent, zerosiam, rivals, memo, meta, trainer and digits of tests/measure/gpu.py."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import by_hand
from by_hand import Call
from cases import Case, Row
from gpu_bench import Bench, set_tf32, source_net, under
from plumbing import make_images, norm_weights, without_running_statistics

ROOT = Path(__file__).parents[2]
SGD = {"optimizer": "sgd", "lr": 2.5e-4}
ALL_KEPT = 2.0  # of ln K: no entropy is above it
RIVALS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # options of ours, and of the loop by hand
    "eata": (
        {**SGD, "entropy_margin": ALL_KEPT, "diversity_margin": 2.0},
        {"entropy_margin": ALL_KEPT, "diversity_margin": 2.0},
    ),
    "sar": (
        {**SGD, "entropy_margin": ALL_KEPT, "reset_threshold": None},
        {"entropy_margin": ALL_KEPT, "reset_threshold": 0.0},
    ),
    "deyo": (
        {**SGD, "entropy_margin": ALL_KEPT, "plpd_threshold": -1.0},
        {"entropy_margin": ALL_KEPT, "plpd_threshold": -1.0},
    ),
    "come": (SGD, {}),
    "cotta": (
        {"optimizer": "sgd", "lr": 1e-2, "anchor_threshold": 1e-6, "restore": 0.001, "symmetric": True},
        {"lr": 1e-2, "restore": 0.001},
    ),
}


# Tent, ZeroSiam, the others: time and memory -------------------------------------------------------------------------


def yardsticks(bench: Bench, net: str, precision: str, x: Tensor) -> dict[str, Callable[[], Call]]:
    """Builders of the bare forward pass, the loop by hand, the least, and the floor."""
    names = list(norm_weights(source_net(net)[0]))
    bf16, last = precision == "bf16", precision != "exact" and net.startswith("ResNet-50")

    def forward() -> Call:
        passes = without_running_statistics(bench.net(net)).requires_grad_(False)
        return torch.no_grad()(under(bf16, passes))

    def least() -> Call:
        step = by_hand.Least(bench.net(net), names, autocast=bf16, channels_last=last)
        return (lambda x: step(x.contiguous(memory_format=torch.channels_last))) if last else step

    found = {
        "forward": forward,
        "by hand": lambda: under(bf16, by_hand.Tent(bench.net(net), names)),
    }
    return {**found, **({"floor": lambda: by_hand.Recorded(least(), x)} if bench.cuda else {"least": least})}


def tent_row(bench: Bench, net: str, precision: str, batch: int, compiled: bool) -> Row:
    """Tent every way."""
    set_tf32(precision == "tf32")
    x, options = bench.images(net, batch), {**SGD, "precision": precision}
    builders = yardsticks(bench, net, precision, x)
    if compiled:
        builders = {name: builders[name] for name in ("by hand", "floor")}
    else:
        builders["plain"] = bench.ours(net, "tent", capture=False, lean=False, **options)
    if bench.cuda:
        builders["captured"] = bench.ours(net, "tent", capture=True, lean=False, **options)
    if not compiled and (bench.smoke or batch == 64):
        builders["lean"] = bench.ours(net, "tent", capture=False, lean=True, **options)
        if bench.cuda:
            builders["captured lean"] = bench.ours(net, "tent", capture=True, lean=True, **options)
    if compiled:
        builders["compiled"] = bench.ours(net, "tent", capture=True, compile=True, **options)
    ratios = [("plain", "by hand"), ("lean", "plain"), ("captured", "by hand"), ("captured", "floor")]
    ratios += [("captured lean", "captured"), ("compiled", "floor"), ("compiled", "captured")]
    row = bench.compare(f"{'compiled' if compiled else 'tent'}: {net} {precision} b{batch}", builders, x, ratios)
    set_tf32(False)
    return row


def tent(bench: Bench) -> Iterator[Case]:
    """Three nets at three batch sizes."""
    cells = [("tiny BN", "exact", (4,)), ("tiny LN", "bf16", (4,))]
    if not bench.smoke:
        sizes = (1, 16, 64)
        cells = [("ResNet-50", "bf16", sizes), ("ViT-B", "bf16", sizes), ("ResNet-26-GN", "exact", sizes)]
        cells += [("ResNet-50", "exact", sizes), ("ResNet-50", "tf32", sizes)]
    for net, precision, batches in cells:
        for batch in batches:
            name = f"{net} {precision} b{batch}"
            yield Case("tent", name, 12, functools.partial(tent_row, bench, net, precision, batch, False))


def compiled(bench: Bench) -> Iterator[Case]:
    """Tent with a compiled net."""
    slow = [("ResNet-50", "bf16", 64, 3), ("ViT-B", "bf16", 64, 6), ("ResNet-50", "bf16", 1, 7)]  # compiling takes time
    for net, precision, batch, rank in [("tiny BN", "exact", 4, 7)] if bench.smoke else slow:
        run = functools.partial(tent_row, bench, net, precision, batch, True)
        yield Case("compiled", f"{net} {precision} b{batch}", 60, run, rank, bench.without_cuda)


def zerosiam_row(bench: Bench, net: str, precision: str, batch: int) -> Row:
    """ZeroSiam beside Tent."""
    builders: dict[str, Callable[[], Call]] = {}
    for way, capture in {"plain": False, **({"captured": True} if bench.cuda else {})}.items():
        shared = {"capture": capture, "precision": precision}
        builders[f"{way} tent"] = bench.ours(net, "tent", **SGD, **shared)
        builders[way] = bench.ours(net, "zerosiam", **shared)
    ratios = [(way, f"{way} tent") for way in ("plain", "captured")]
    return bench.compare(f"zerosiam: {net} {precision} b{batch}", builders, bench.images(net, batch), ratios)


def zerosiam(bench: Bench) -> Iterator[Case]:
    """Over Tent."""
    cells = [("tiny GN", "exact", (4,))] if bench.smoke else [("ResNet-50", "bf16", (1, 16, 64))]
    if not bench.smoke:
        cells += [("ResNet-26-GN", "exact", (1, 64)), ("ViT-B", "bf16", (1, 64))]
    for net, precision, batches in cells:
        for batch in batches:
            run = functools.partial(zerosiam_row, bench, net, precision, batch)
            yield Case("zerosiam", f"{net} {precision} b{batch}", 8, run, 2)


def rival_builders(
    bench: Bench, net: str, method: str, ours: dict[str, Any], theirs: dict[str, Any]
) -> dict[str, Callable[[], Call]]:
    """Ours, and the authors' algorithm by hand on the same parameters."""

    def loop() -> Call:
        if method == "cotta":
            return by_hand.CoTTA(bench.net(net), **theirs)
        like: Any = bench.ours(net, method, **ours)()
        names = [name.removeprefix("model.") for name in like.adaptable if name.startswith("model.")]
        more = {"fisher": [like.get_buffer(f"fisher_{i}") for i in range(len(names))]} if method == "eata" else {}
        call: Call = by_hand.LOOPS[method](bench.net(net), names, **theirs, **more)
        return call

    builders = {"by hand": loop, "plain": bench.ours(net, method, capture=False, **ours)}
    if bench.cuda:
        builders["captured"] = bench.ours(net, method, capture="auto", **ours)
    return builders


def rival_row(bench: Bench, net: str, method: str, batch: int) -> Row:
    """One method against its authors' algorithm."""
    builders = rival_builders(bench, net, method, *RIVALS[method])
    ratios = [("plain", "by hand"), ("captured", "by hand"), ("captured", "plain")]
    return bench.compare(f"rivals: {method} {net} exact b{batch}", builders, bench.images(net, batch), ratios)


def rivals(bench: Bench) -> Iterator[Case]:
    """All but Tent, in float32."""
    net, batches = ("tiny BN", (4,)) if bench.smoke else ("ResNet-50", (64, 1, 16))
    for batch in batches:
        for method in RIVALS:
            run = functools.partial(rival_row, bench, net, method, batch)
            yield Case("rivals", f"{method} {net} exact b{batch}", 15, run, 5 if batch == 16 else 2)


# MEMO, Meta-TTT, the Trainer, the digits -----------------------------------------------------------------------------


def bare_memo(net: nn.Module, views: Tensor, names: list[str] | None) -> Call:
    """The passes of MEMO alone: of all images at once (``names``: what learns), or one by one for all parameters."""
    parameters = dict(net.requires_grad_(False).named_parameters())
    weights = [weight.requires_grad_() for name, weight in parameters.items() if names is None or name in names]

    def gradients(views: Tensor) -> tuple[Tensor, ...]:
        images, each = views.shape[:2]
        log_p = net(views.flatten(0, 1)).log_softmax(-1).view(images, each, -1)
        log_mean = log_p.logsumexp(1) - torch.tensor(float(each)).log().item()
        return torch.autograd.grad(-(log_mean.exp() * log_mean).sum(), weights)

    def run(x: Tensor) -> Tensor:
        logits = []
        for images, made in [(x, views)] if names is not None else zip(x.split(1), views.split(1), strict=True):
            gradient = gradients(made)
            with torch.no_grad():
                torch._foreach_add_(weights, gradient, alpha=-1e-9)
                logits.append(net(images))
                torch._foreach_add_(weights, gradient, alpha=1e-9)
        return torch.cat(logits)

    return run


def memo_row(bench: Bench, net: str, params: str, images: int, views: int, augment: str) -> Row:
    """Images a second."""
    x, options = bench.images(net, images), {"views": views, "augment": augment, "params": params}
    names = list(norm_weights(source_net(net)[0])) if params == "norm" else None
    repeated = x[:, None].expand(-1, views, -1, -1, -1).contiguous()
    builders = {
        "bare": lambda: bare_memo(bench.net(net), repeated, names),
        "plain": bench.ours(net, "memo", capture=False, **options),
        "auto": bench.ours(net, "memo", **options),
    }
    times, memory = bench.measure(f"memo: {net} {params} S={images}", builders, x)
    row: Row = {f"{name}, images/s": 1000 * images / value for name, value in times.items()}
    row |= {f"{name} / bare": times["bare"] / times[name] for name in ("plain", "auto") if {name, "bare"} <= {*times}}
    return row | {f"{name}, MB": round(value) for name, value in memory.items()}


def memo(bench: Bench) -> Iterator[Case]:
    """The norm parameters, and all."""
    cells = [("tiny BN", params, 2, 2, "augmix_crop", 1) for params in ("norm", "all")]
    if not bench.smoke:
        cells = [("ResNet-26-GN", "norm", images, 32, "augmix_crop", 6) for images in (64, 1, 4, 16)]
        cells += [("ResNet-26-GN", "all", images, 32, "augmix_crop", 25) for images in (64, 1, 4, 16)]
        cells += [("ResNet-50", params, 8, 16, "augmix", 15) for params in ("norm", "all")]
    for net, params, images, views, augment, seconds in cells:
        run = functools.partial(memo_row, bench, net, params, images, views, augment)
        yield Case("memo", f"{net} {params} S={images}", seconds, run, 4)


def meta_row(bench: Bench) -> Row:
    """A plain step, and outer steps in which all layers, or the last ones, adapt."""
    import meta_step

    size = {"net": "cifar/resnet20", "images": 4, "pixels": 16}
    size = size if bench.smoke else {"net": "torchvision/resnet18", "images": 16, "pixels": 64}
    options = Namespace(classes=10, domains=2, steps=1, deep=0.3, device=bench.device, **size)

    steps = meta_step.build(options, torch.float32)  # before, so that the nets do not count as memory of a step

    def build(kind: str) -> Callable[[], Call]:
        return lambda: lambda x: steps[kind]()[0]

    builders = {name: build(kind) for name, kind in (("plain", "plain"), ("ours", "ours"), ("deep", "ours_deep"))}
    return bench.compare("meta: outer step", builders, torch.empty(0), [("ours", "plain"), ("deep", "plain")])


def meta(bench: Bench) -> Iterator[Case]:
    """The outer step of Meta-TTT."""
    yield Case("meta", "outer step", 12, functools.partial(meta_row, bench), 4)


def trainer_row(bench: Bench) -> Row:
    """A batch of Tent bare (copied to the device and back), in a Trainer, and with TensorBoard."""
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.loggers import TensorBoardLogger

    from lightning_tta import TestTimeAdaptation
    from lightning_tta.methods import Tent

    name, number, batch = ("tiny BN", 6, 8) if bench.smoke else ("ResNet-20", 200, 64)
    made = [make_images(batch, seed, size=source_net(name)[1]) for seed in range(min(number, 20))]
    rows = [{"image": made[i % len(made)], "index": torch.arange(batch) + batch * i} for i in range(number)]
    loader = torch.utils.data.DataLoader(rows, batch_size=None)  # type: ignore[arg-type]  # a list is a data set
    options: dict[str, Any] = {"optimizer": "sgd", "lr": 1e-3}
    method = bench.ours(name, "tent", **options)()
    for row in rows[:5]:
        method(row["image"].to(bench.device))

    def bare() -> None:
        for row in rows:
            method(row["image"].to(bench.device)).cpu()

    class Clock(Callback):
        def on_predict_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int, *more: Any) -> None:
            if batch_idx == 5 % number:
                bench.synchronize()
                self.start = time.perf_counter()

        def on_predict_epoch_end(self, trainer: Any, module: Any) -> None:
            bench.synchronize()
            self.each = (time.perf_counter() - self.start) / (number - 5)

    def in_a_trainer(board: bool) -> float:
        clock = Clock()
        with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
            trainer = Trainer(
                accelerator="gpu" if bench.cuda else "cpu",
                devices=1,
                logger=TensorBoardLogger(place) if board else False,
                default_root_dir=place,
                callbacks=[clock],
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            module = TestTimeAdaptation(functools.partial(Tent, **options), backbone=bench.net(name))
            trainer.predict(module, loader, return_predictions=False)
        return clock.each

    times = {"bare": [], "Trainer": [], "TensorBoard": []}
    for _ in range(1 if bench.smoke else 3):
        times["bare"].append(bench.clock(bare) / number)
        times["Trainer"].append(in_a_trainer(False))
        times["TensorBoard"].append(in_a_trainer(True))
    medians = {name: 1000 * statistics.median(values) for name, values in times.items()}
    ratios = {f"{name} / bare": medians[name] / medians["bare"] for name in ("Trainer", "TensorBoard")}
    return {**{f"{name}, ms": value for name, value in medians.items()}, **ratios}


def trainer(bench: Bench) -> Iterator[Case]:
    """What the Trainer costs."""
    yield Case("trainer", "tent", 25, functools.partial(trainer_row, bench), 5)


def digits_row() -> Row:
    """Seconds of the benchmark on the digits, source training included: on the GPU, and on two cores."""
    seconds = {}
    for where in ("GPU", "CPU"):
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            **({} if where == "GPU" else {"CUDA_VISIBLE_DEVICES": ""}),
        }
        with tempfile.TemporaryDirectory() as place:
            command = [sys.executable, "-m", "lightning_tta", "benchmark", "--config=configs/digits/benchmark.yaml"]
            command += [f"--output={place}", f"--trainer.accelerator={where.lower()}"]
            if where == "CPU":
                command = ["taskset", "-c", "0,1", *command]
            start = time.perf_counter()
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
            seconds[where] = time.perf_counter() - start
        if done.returncode:
            raise RuntimeError(f"the benchmark ended with {done.returncode}: {(done.stderr or done.stdout)[-600:]}")
    row: Row = {f"{where}, s": value for where, value in seconds.items()}
    return {**row, "GPU / CPU": seconds["GPU"] / seconds["CPU"]}


def digits(bench: Bench) -> Iterator[Case]:
    """A whole job."""
    not_here = bench.without_cuda or ("left out of --smoke" if bench.smoke else "")
    yield Case("digits", "benchmark", 130, digits_row, 8, not_here)
