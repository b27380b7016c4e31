"""Where the cases of tests/measure/gpu.py run: the device, the nets, and how a call is timed."""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from by_hand import Call
from cases import Account, Row
from lightning_tta import adapt, create_backbone
from plumbing import make_images, make_net

Builders = Mapping[str, Callable[[], Call]]


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
        self.device, self.smoke, self.account = device, smoke, account

    @property
    def cuda(self) -> bool:
        """Whether it is a GPU, whose steps can be recorded."""
        return self.device == "cuda"

    @property
    def without_cuda(self) -> str:
        """Why what needs CUDA cannot run; empty if it can."""
        return "" if self.cuda else "needs CUDA"

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
                made.prepare([{"image": x, "label": torch.arange(4) % 2}] * 2)
            return made

        return build

    def measure(
        self, case: str, builders: Builders, x: Tensor, seconds: float = 0.6
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
                    enough = number >= (4 if self.cuda else 1)
                    if enough and (self.smoke or time.perf_counter() - start > 0.5):
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
        self, case: str, builders: Builders, x: Tensor, ratios: Iterable[tuple[str, str]], seconds: float = 0.6
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
