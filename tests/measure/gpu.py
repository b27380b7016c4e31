"""What a GPU gets from this package: speed against loops by hand and against one CUDA graph, memory, correctness.

    python tests/measure/gpu.py                        # all, in under ten minutes on one GPU
    python tests/measure/gpu.py --go-on                # what the file does not have yet
    python tests/measure/gpu.py --section tent memo
    python tests/measure/gpu.py --smoke                # tiny nets, a few batches; without a GPU this is what runs

Cases run in the order of their importance, each guarded; what went wrong, what needs a GPU and what the budget left out
is named at the end. The file grows with each case; ``--show`` prints it. Times are medians of single synchronised
calls, taken in turn. Columns of the sections:

tent, zerosiam
    ``forward``: no gradients. ``by hand``: the usual loop (tests/measure/by_hand.py). ``least``: forward, gradients and
    step with nothing beside them. ``floor``: that as one CUDA graph. ``plain``, ``captured``, ``compiled``, ``lean``:
    this package. MB: the peak while it was built and called, above what was there before.
rivals
    The authors' algorithms by hand, with filters that keep all samples, so that both do all of the work.
memo
    Images a second; ``bare``: the passes alone, of views that were made before.
correct
    Largest difference of logits and state after five batches, over nets with BatchNorm, GroupNorm and LayerNorm and
    batches of 1 and 8; how many of the runs were equal bit by bit with ``deterministic=True``.
waits
    A step of a method: operations, those that ask the host, and on a GPU kernels and waits for it.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import io
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import by_hand
import lightning_tta
from by_hand import Call
from cases import Account, Case, Row
from lightning_tta import adapt, available_methods, create_backbone
from lightning_tta.errors import ConfigError, UnsupportedModelError
from plumbing import arguments, make_images, make_net, norm_weights, same, without_running_statistics

ROOT = Path(__file__).parents[2]
PACKAGE = str(Path(lightning_tta.__file__).parent)
Builders = Mapping[str, Callable[[], Call]]
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
GOALS = [  # on an H100: section, row, column, at most (MEMO: at least)
    *(("tent", f"ResNet-50 bf16 b{b}", "captured, ms", goal) for b, goal in ((1, 2.0), (16, 4.9), (64, 12.0))),
    ("tent", "ResNet-50 bf16 b64 compiled", "compiled, ms", 12.0),
    *(("tent", f"ViT-B bf16 b{b}", "captured, ms", goal) for b, goal in ((1, 2.0), (16, 5.9), (64, 17.0))),
    ("tent", "ViT-B bf16 b64 compiled", "compiled, ms", 17.0),
    *(("tent", f"ResNet-26-GN exact b{b}", "captured, ms", goal) for b, goal in ((1, 1.2), (16, 1.5), (64, 2.6))),
    *(("tent", f"ResNet-50 exact b{b}", "captured, ms", goal) for b, goal in ((1, 4.6), (16, 15.9), (64, 53.3))),
    ("tent", "ResNet-50 exact b64", "captured lean, MB", 3200),
    ("tent", "ResNet-50 exact b64", "captured lean / captured", 1.0),
    *(
        ("zerosiam", f"ResNet-50 bf16 b{b}", "captured / captured tent", goal)
        for b, goal in ((1, 1.2), (16, 1.1), (64, 1.03))
    ),
    *(
        ("rivals", f"{name} ResNet-50 exact b{b}", "captured / by hand", goal)
        for name in ("eata", "sar", "deyo", "come")
        for b, goal in ((1, 0.5), (16, 0.7), (64, 0.98))
    ),
    ("rivals", "cotta ResNet-50 exact b64", "captured / by hand", 0.35),
    ("memo", "ResNet-26-GN norm S=64", "auto, images/s", 1100),
    ("memo", "ResNet-26-GN all S=64", "auto, images/s", 65),
    ("memo", "ResNet-50 norm S=8", "auto, images/s", 70),
    ("memo", "ResNet-50 all S=8", "auto, images/s", 35),
    ("meta", "outer step", "ours, ms", 45.0),
    ("meta", "outer step", "ours, MB", 191),
    ("trainer", "tent", "TensorBoard / bare", 1.15),
    ("digits", "benchmark", "GPU / CPU", 0.5),
]


@functools.cache
def source_net(name: str) -> tuple[nn.Module, int]:
    """A net with random weights, in eval mode on the CPU, and the side of its images."""
    torch.manual_seed(0)
    if name == "ResNet-50":
        from torchvision.models import resnet50

        return resnet50(weights=None).eval(), 224
    if name == "ViT-B":
        import timm

        return timm.create_model("vit_base_patch16_224", pretrained=False).eval(), 224
    if name.startswith("tiny"):
        return make_net(name.split()[1].lower()), 16
    return create_backbone(f"cifar/{name.lower().replace('-gn', '_gn').replace('-', '')}", 10).eval(), 32


def set_tf32(allowed: bool) -> None:
    """For the loops by hand; ours have ``precision``."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


class Bench:
    """Where and at which size the cases run.

    Args:
        device: Of nets and images.
        smoke: Tiny nets and few calls.
        account: Of what is found.
    """

    def __init__(self, device: str, smoke: bool, account: Account) -> None:
        self.device, self.smoke, self.account, self.cuda = device, smoke, account, device == "cuda"
        self.without_cuda = "" if self.cuda else "needs CUDA"

    def net(self, name: str) -> nn.Module:
        """A copy of its own."""
        return copy.deepcopy(source_net(name)[0]).to(self.device)

    def images(self, name: str, batch: int) -> Tensor:
        """Pixels (B, 3, H, W)."""
        return make_images(batch, size=source_net(name)[1]).to(self.device)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def clock(self, run: Callable[[], object]) -> float:
        """Seconds of one synchronised call."""
        self.synchronize()
        start = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - start

    def ours(self, net: str, method: str, **options: Any) -> Callable[[], Call]:
        """A builder of this package's method, prepared."""

        def build() -> Call:
            made = adapt(self.net(net), method, in_place=True, **options)
            if not made.prepared:
                x = self.images(net, 4)
                made.prepare([{"image": x, "label": torch.zeros(4, dtype=torch.int64)}] * 2)
            return made

        return build

    def measure(
        self, case: str, builders: Builders, x: Tensor, seconds: float = 1.0
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Build, warm up, and take turns; what fails is written down and left out.

        Returns:
            Medians of a call in ms, and peaks in MB (of CUDA alone), by the builders' names.
        """
        runs: dict[str, Call] = {}
        memory: dict[str, float] = {}
        for name, build in builders.items():
            with self.account.guarded(f"{case}, {name}"):
                before = torch.cuda.memory_allocated() if self.cuda else 0
                if self.cuda:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                call = build()
                start = time.perf_counter()
                for number in range(8):  # the first ones are plain, then one is recorded
                    call(x)
                    self.synchronize()
                    if number >= (1 if self.smoke and not self.cuda else 4) and time.perf_counter() - start > 0.5:
                        break
                if self.cuda:
                    memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
                self._note_plain(f"{case}, {name}", call)
                runs[name] = call
        times: dict[str, list[float]] = {name: [] for name in runs}
        most, spent = (3, 0.0) if self.smoke else (30, 0.0)
        for number in range(most):
            for name in list(runs) if number % 2 == 0 else reversed(list(runs)):
                times[name].append(self.clock(lambda call=runs[name]: call(x)))
                spent += times[name][-1]
            if number >= 2 and spent > seconds * len(runs):
                break
        return {name: 1000 * statistics.median(values) for name, values in times.items()}, memory

    def _note_plain(self, label: str, call: Call) -> None:
        """Write down what was not recorded although it was to be."""
        report = capture_report(call)
        execution = getattr(call, "execution", None)
        if self.cuda and execution is not None and execution.capture is not False and not is_recorded(report):
            self.account.notes[f"{label}: not recorded"] = report or "the method gives no report"

    def compare(
        self, case: str, builders: Builders, x: Tensor, ratios: Iterable[tuple[str, str]], seconds: float = 1.0
    ) -> Row:
        """A row: milliseconds, ratios, megabytes."""
        times, memory = self.measure(case, builders, x, seconds)
        row: Row = {f"{name}, ms": value for name, value in times.items()}
        row |= {f"{one} / {other}": times[one] / times[other] for one, other in ratios if {one, other} <= times.keys()}
        return row | {f"{name}, MB": round(value) for name, value in memory.items()}


def capture_report(method: object) -> dict[str, str]:
    """By part and shape: recorded, or why not; empty of what is no method."""
    report = getattr(method, "capture_report", None)
    return dict(report()) if callable(report) else {}


def is_recorded(report: Mapping[str, str]) -> bool:
    """Whether any part was."""
    return any(str(value) == "recorded" for value in report.values())


def under(bf16: bool, call: Call) -> Call:
    """A call under autocast."""

    def run(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            return call(x)

    return run


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
        "least": least,
        "floor": lambda: by_hand.Recorded(least(), x),
    }
    return found if bench.cuda else {name: build for name, build in found.items() if name != "floor"}


def tent_row(bench: Bench, net: str, precision: str, batch: int, compiled: bool) -> Row:
    """Tent every way."""
    set_tf32(precision == "tf32")
    x, options = bench.images(net, batch), {**SGD, "precision": precision}
    builders = yardsticks(bench, net, precision, x)
    if compiled:
        builders = {name: builders[name] for name in ("by hand", "floor")}
    else:
        builders["plain"] = bench.ours(net, "tent", capture=False, lean=False, **options)
        builders["lean"] = bench.ours(net, "tent", capture=False, lean=True, **options)
    if bench.cuda:
        builders["captured"] = bench.ours(net, "tent", capture=True, lean=False, **options)
        builders["captured lean"] = bench.ours(net, "tent", capture=True, lean=True, **options)
    if compiled:
        builders["compiled"] = bench.ours(net, "tent", capture=True, compile=True, **options)
    ratios = [("plain", "by hand"), ("lean", "plain"), ("captured", "by hand"), ("captured", "floor")]
    ratios += [("captured lean", "captured"), ("compiled", "floor"), ("compiled", "captured")]
    row = bench.compare(f"tent: {net} {precision} b{batch}{' compiled' * compiled}", builders, x, ratios)
    set_tf32(False)
    return row


def tent(bench: Bench) -> Iterator[Case]:
    """Three kinds of nets at three batch sizes."""
    cells = [("tiny BN", "exact", (4,)), ("tiny LN", "bf16", (4,))]
    if not bench.smoke:
        sizes = (1, 16, 64)
        cells = [("ResNet-50", "bf16", sizes), ("ViT-B", "bf16", sizes), ("ResNet-26-GN", "exact", sizes)]
        cells += [("ResNet-50", "exact", sizes), ("ResNet-50", "tf32", sizes)]
    for net, precision, batches in cells:
        for batch in batches:
            name = f"{net} {precision} b{batch}"
            yield Case("tent", name, 12, functools.partial(tent_row, bench, net, precision, batch, False))
    slow = [("ResNet-50", "bf16", 64), ("ViT-B", "bf16", 64), ("ResNet-50", "bf16", 1), ("ResNet-26-GN", "exact", 64)]
    for net, precision, batch in [("tiny BN", "exact", 4)] if bench.smoke else slow:
        run = functools.partial(tent_row, bench, net, precision, batch, True)
        yield Case("tent", f"{net} {precision} b{batch} compiled", 60, run, 7, bench.without_cuda)


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
            yield Case("rivals", f"{method} {net} exact b{batch}", 15, run, 2)


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

    def build(kind: str) -> Callable[[], Call]:
        def made() -> Call:
            step = meta_step.build(options, torch.float32)[kind]
            return lambda x: step()[0]

        return made

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


# Right, and repeatable -----------------------------------------------------------------------------------------------

KINDS_OF_PASSES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {"precision": "exact"}),
    "bf16": (torch.float32, {"precision": "bf16"}),
    "bfloat16": (torch.bfloat16, {}),
}


class Streamed:
    """A method on one of the tests' nets, and what five batches gave.

    Args:
        case: Name and options of the method, kind of the net, images in a batch.
        device: Where.
        dtype: Of net and images.
        resumed: Whether the last three batches are taken by another one, that has its state.
        **execution: Its options.
    """

    def __init__(
        self,
        case: tuple[str, dict[str, Any], str, int],
        device: str,
        dtype: torch.dtype = torch.float32,
        resumed: bool = False,
        **execution: Any,
    ) -> None:
        name, options, kind, batch = case
        stream = [make_images(batch, seed, dtype).to(device) for seed in range(5)]

        def build() -> Any:
            method = adapt(make_net(kind).to(device, dtype), name, in_place=True, **options, **execution)
            if not method.prepared:
                source = [make_images(8, 50 + number, dtype).to(device) for number in range(2)]
                method.prepare([{"image": images, "label": torch.arange(8) % 5} for images in source])
            return method

        method = build()
        logits = []
        for number, images in enumerate(stream):
            if resumed and number == 2:
                saved, method = method.state_dict(), build()
                method.load_state_dict(saved)
            logits.append(method(images))
        self.report = capture_report(method)
        self.logits = [u.cpu() for u in logits]
        self.state = {name: t.detach().cpu() for name, t in method.adaptable.items()}
        self.state |= {name: value.cpu() for name, value in method.memory.items() if isinstance(value, Tensor)}

    def difference(self, other: Streamed) -> float:
        """The largest, of logits and state."""
        pairs = [*zip(self.logits, other.logits, strict=True)]
        pairs += [(value, other.state[name]) for name, value in self.state.items() if name in other.state]
        found = [0.0]
        for one, two in pairs:
            gap = (one.double() - two.double()).abs()
            found.append(
                float(gap[~(one.isnan() & two.isnan())].nan_to_num(nan=float("inf")).max()) if gap.numel() else 0
            )
        return max(found)

    def equals(self, other: Streamed) -> bool:
        """Bit by bit."""
        return same([self.logits, self.state], [other.logits, other.state])


def correct_row(bench: Bench, name: str, options: dict[str, Any]) -> Row:
    """One method on all nets, precisions and batch sizes."""
    worst: dict[str, float] = {}
    equal: dict[str, list[bool]] = {}
    counts = Counter({"recorded": 0, "refused": 0})

    def widest(column: str, value: float) -> None:
        worst[column] = max(worst.get(column, 0.0), value)

    kinds, batches = (("bn", "ln"), (3,)) if bench.smoke else (("bn", "gn", "ln"), (8, 1))
    for kind in kinds:
        for passes, (dtype, execution) in KINDS_OF_PASSES.items():
            for batch in batches:
                run = functools.partial(Streamed, (name, options, kind, batch))
                here = functools.partial(run, bench.device, dtype, **execution)
                with bench.account.guarded(f"correct: {name} {kind} {passes} b{batch}"):
                    try:
                        plain = here(capture=False)
                    except UnsupportedModelError:
                        counts["refused"] += 1
                        continue
                    if passes == "fp32":
                        widest("lean - whole", here(capture=False, lean=True).difference(plain))
                        if bench.cuda:
                            widest("GPU - CPU", run("cpu", dtype, **execution).difference(plain))
                    if bench.cuda:
                        try:
                            captured = here(capture=True)
                        except (ConfigError, UnsupportedModelError) as error:
                            bench.account.notes[f"correct: {name} {kind} {passes} b{batch}: not captured"] = str(error)
                            continue
                        counts["recorded"] += is_recorded(captured.report)
                        widest(f"captured - plain, {passes}", captured.difference(plain))
                if passes == "fp32" and batch == batches[0]:
                    with bench.account.guarded(f"correct: {name} {kind} deterministic"):
                        exact = functools.partial(here, deterministic=True)
                        first = exact(capture=False)
                        pairs = {"two runs": exact(capture=False), "resumed": exact(capture=False, resumed=True)}
                        if bench.cuda:
                            pairs["captured = plain"] = captured = exact()
                            pairs["captured, resumed"] = exact(resumed=True)
                        for column, other in pairs.items():
                            equal.setdefault(column, []).append(other.equals(first))
    row: Row = {**counts, **worst}
    return row | {f"bits: {column}": f"{sum(values)} of {len(values)}" for column, values in equal.items()}


def alone_row() -> Row:
    """``deterministic=True`` in a process of its own, which has set nothing before."""
    code = (
        "import torch, lightning_tta\n"
        "net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.AdaptiveAvgPool2d(1), "
        "torch.nn.Flatten(), torch.nn.Linear(8, 5)).cuda()\n"
        "method = lightning_tta.adapt(net, 'tent', deterministic=True)\n"
        "print([float(method(torch.rand(8, 3, 16, 16, device='cuda')).sum()) for _ in range(4)])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    return {"in a fresh process": "runs" if done.returncode == 0 else done.stderr.strip().splitlines()[-1][:200]}


def correct(bench: Bench) -> Iterator[Case]:
    """Every method."""
    from contract import VARIANTS

    for name in ("tent", "cotta") if bench.smoke else available_methods():
        run = functools.partial(correct_row, bench, name, VARIANTS.get(name, [{}])[0])
        yield Case("correct", name, 15, run, 1)
    yield Case("correct", "deterministic=True", 20, alone_row, 3, bench.without_cuda)


# Where a step waits --------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts operations, and those whose result or shape has to come to the host."""

    ASK = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "unique", "equal", "is_nonzero", "bincount")

    def __init__(self) -> None:
        super().__init__()
        self.number, self.asking = 0, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        masks = args[1] if name in ("index", "index_put", "index_put_") else ()
        self.number += 1
        if name in self.ASK or any(mask is not None and mask.dtype == torch.bool for mask in masks):
            self.asking[name] += 1
        return func(*args, **(kwargs or {}))


def waits_of(step: Callable[[], object]) -> Counter[str]:
    """The package's lines that wait for the GPU."""
    lines: Counter[str] = Counter()

    def count(message: Any, *more: Any, **others: Any) -> None:
        if "synchroniz" in str(message):
            mine = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
            lines[f"{mine[-1].filename[len(PACKAGE) + 1 :]}:{mine[-1].lineno}" if mine else "elsewhere"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return lines


def kernels_of(step: Callable[[], object]) -> tuple[int, float]:
    """Kernels of a step, and milliseconds in which at least one of them runs."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    events = [event for event in found.events() if "CUDA" in str(event.device_type)]
    spans = sorted(
        (e.time_range.start, e.time_range.end) for e in events if not e.name.startswith(("Mem", "ProfilerStep"))
    )
    busy, end = 0.0, float("-inf")
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return len(spans), busy / 1000


def waits_row(bench: Bench, net: str, name: str, options: dict[str, Any], batch: int) -> Row:
    """A step of one method, plain and captured."""
    x, row = bench.images(net, batch), {}
    for way in ("plain", "captured") if bench.cuda else ("plain",):
        with bench.account.guarded(f"waits: {name} {way}"):
            method = bench.ours(net, name, capture=False if way == "plain" else "auto", **options)()
            for _ in range(4 if bench.cuda else 2):
                method(x)
            if way == "plain":
                with Operations() as operations:
                    method(x)
                row |= {"operations": operations.number, "asking": operations.asking.total()}
                if operations.asking:
                    bench.account.notes[f"waits: {name}: asking"] = dict(operations.asking)
            if bench.cuda:
                lines = waits_of(lambda call=method: call(x))
                bench.account.notes[f"waits: {name} {way}: lines"] = dict(lines)
                kernels, busy = kernels_of(lambda call=method: call(x))
                idle = 1 - busy / (1000 * statistics.median(bench.clock(lambda call=method: call(x)) for _ in range(5)))
                row |= {f"{way}: waits": lines.total(), f"{way}: kernels": kernels, f"{way}: idle": f"{idle:.0%}"}
    return row


def waits(bench: Bench) -> Iterator[Case]:
    """Every method."""
    few = {"memo": {"views": 4}, "zero": {"views": 4}, "view_averaging": {"views": 4}}
    net, batch = ("tiny GN", 4) if bench.smoke else ("ResNet-26-GN", 16)
    for name in ("tent", "zerosiam", "memo") if bench.smoke else available_methods():
        options = RIVALS[name][0] if name in RIVALS else few.get(name, {})
        if name == "norm":  # takes BatchNorm alone
            continue
        yield Case("waits", name, 8, functools.partial(waits_row, bench, net, name, options, batch), 3)


SECTIONS: dict[str, Callable[[Bench], Iterator[Case]]] = {
    "tent": tent,
    "correct": correct,
    "zerosiam": zerosiam,
    "rivals": rivals,
    "waits": waits,
    "memo": memo,
    "meta": meta,
    "trainer": trainer,
    "digits": digits,
}


def machine(device: str) -> Row:
    """What ran this, and when."""
    cuda = device == "cuda"
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "hardware": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, no GPU",
        "torch": torch.__version__,
        "cuDNN": torch.backends.cudnn.version() if cuda else None,
        "python": platform.python_version(),
        "commit": done.stdout.strip(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def goals(rows: Mapping[str, Mapping[str, Row]]) -> str:
    """A table of what was to be reached on an H100, beside what was."""
    lines = ["", "## goals (H100)", "", "| | goal | measured |", "|---|---:|---:|"]
    for section, case, column, goal in GOALS:
        value = rows.get(section, {}).get(case, {}).get(column)
        sign = ">=" if "images/s" in column else "<="
        lines.append(
            f"| {section}: {case}: {column} | {sign} {goal:g} | {'not run' if value is None else f'{value:.3g}'} |"
        )
    return "\n".join(lines)


def main(args: list[str] | None = None) -> Account:
    """Run the cases and print all that is known."""
    options = arguments(
        __doc__,
        args,
        section=list(SECTIONS),
        budget=(540.0, "seconds"),
        output=("runs/gpu.json", "file of the results"),
        smoke=(False, "tiny nets, few calls"),
        quick=(False, "without the benchmark on the digits"),
        go_on=(False, "keep what the file has, run the rest"),
        show=(False, "print what the file has, run nothing"),
        device=("cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu"),
    )
    smoke = options.smoke or options.device != "cuda"
    account = Account(machine(options.device), options.budget, Path(options.output))
    if options.go_on or options.show:
        account.go_on()
    if not options.show:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first matrix product
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        set_tf32(False)
        run_all(Bench(options.device, smoke, account), options)
    print(account.text())
    if not smoke or options.show:
        print(goals(account.rows))
    return account


def run_all(bench: Bench, options: Namespace) -> None:
    """The cases of the sections that were asked for, by rank."""
    cases: list[Case] = []
    for name in options.section:
        if name == "digits" and options.quick:
            bench.account.left_out["digits"] = "--quick"
            continue
        with bench.account.guarded(name):
            cases += SECTIONS[name](bench)
    for case in sorted(cases, key=lambda case: case.rank):
        bench.account.run(case)
        if bench.cuda and is_broken():
            go_on_afresh(bench.account)


def is_broken() -> bool:
    """Whether the GPU answers no more in this process."""
    try:
        torch.cuda.synchronize()
        return False
    except RuntimeError:
        return True


def go_on_afresh(account: Account) -> None:
    """A new process in the place of this one, for the cases that are left."""
    rest, skip = [], False
    for word in sys.argv[1:]:
        if not skip and not word.startswith("--budget"):
            rest.append(word)
        skip = word == "--budget"
    sys.stdout.flush()
    command = [sys.executable, __file__, *dict.fromkeys([*rest, "--go-on"]), f"--budget={account.left():.0f}"]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
