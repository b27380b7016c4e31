"""What a run costs in memory, and what its method forgot of the source."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from lightning_tta.data.base import ShiftedDataModule
from lightning_tta.errors import ConfigError
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.run.matching import labels_among, predicted


class PeakMemory:
    """The largest memory in use since :meth:`start`.

    On CUDA what torch had allocated; elsewhere the resident memory of the process, which holds data and libraries
    too. Linux can start that count anew; where it cannot be, it is the peak of the process's whole life.
    """

    def __init__(self) -> None:
        self.kind = "not started"

    def start(self, device: torch.device) -> None:
        """Begin to watch."""
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.kind = "allocated on the GPU"
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # 5: forget the peak of the resident memory
            self.kind = "resident, of the run"
        except OSError:
            self.kind = "resident, of the process's whole life"

    def result(self) -> dict[str, float | str | None]:
        """``peak_memory_mb`` (of 10^6 bytes), and ``peak_memory``: what was counted."""
        if self.device.type == "cuda":
            peak = float(torch.cuda.max_memory_allocated(self.device))
        else:
            found = _resident_peak()
            if found is None:
                return {"peak_memory_mb": None, "peak_memory": None}
            peak = float(found)
        return {"peak_memory_mb": peak / 1e6, "peak_memory": self.kind}


def _resident_peak() -> int | None:
    """Bytes: VmHWM, which Linux counts from the last start, else getrusage's; ``None`` where there is neither."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else ():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:  # Windows
        return None
    return (1 if sys.platform == "darwin" else 1024) * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def check_forgetting(data: Any) -> None:
    """Refuse early what cannot be measured.

    Raises:
        ConfigError: If there are no clean source images.
    """
    if not isinstance(data, ShiftedDataModule):
        raise ConfigError(
            "measure_forgetting needs clean source test images: predict with a data module of lightning_tta, or leave "
            "it out."
        )


def source_accuracy(
    method: TTAMethod, data: ShiftedDataModule, classes: list[int] | None, device: torch.device
) -> float | None:
    """Accuracy of ``method.predict`` on clean source test images, in [0, 1]; the method adapts on nothing.

    At most ``num_images`` of them, in batches of the stream's size, in a fixed random order: a method that predicts
    with the statistics of a batch sees batches of all classes. Of a net cut to some classes, images of these.
    """
    images = data.clean("test")
    positions = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    if classes is not None:
        positions = positions[torch.isin(images.labels[positions], torch.tensor(classes))]
    positions = positions[: data.num_images]
    labels = labels_among(images.labels[positions], classes)
    right = predicted(method.predict, images, positions, data.batch_size, device) == labels
    known = int((labels >= 0).sum())
    return int(right.sum()) / known if known else None


def measure(module: Any) -> dict[str, Any]:
    """What is measured when the stream has ended: peak memory and, if asked for, forgetting."""
    found: dict[str, Any] = module.peak_memory.result()
    if module.measure_forgetting:
        data = module.trainer.datamodule
        found["source_accuracy_after"] = source_accuracy(module.method, data, module.classes, module.device)
    return found
