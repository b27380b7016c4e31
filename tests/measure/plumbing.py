"""What the scripts share: arguments, tables, times taken in turn, memory, predict runs, and the tests' small nets."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from lightning_tta.data import DigitsData, FolderData, ShiftedDataModule
from lightning_tta.data.splits import subset
from lightning_tta.modules import TestTimeAdaptation

sys.path.append(str(Path(__file__).parents[1]))
from nets import (
    TinyNet,
    make_images,
    make_net,
    norm_weights,
    same,
    without_running_statistics,
)  # found by the line above where a script is run on its own

__all__ = [
    "CUDA_OR_CPU",
    "TinyNet",
    "arguments",
    "digits_or_folder",
    "header",
    "leaves",
    "make_images",
    "make_net",
    "medians",
    "norm_weights",
    "on_device",
    "positions_of",
    "predict",
    "resident",
    "row",
    "same",
    "take_turns",
    "without_running_statistics",
]

CUDA_OR_CPU = "cuda" if torch.cuda.is_available() else "cpu"


def arguments(doc: str | None, args: Sequence[str] | None, **options: Any) -> argparse.Namespace:
    """The command line. An option is its default, or (default, help); a type in place of a default: it is required."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n\n")[0])
    for name, option in options.items():
        default, text = option if isinstance(option, tuple) else (option, None)
        flag = f"--{name.replace('_', '-')}"
        if isinstance(default, bool):
            parser.add_argument(flag, action="store_true", help=text)
        elif isinstance(default, type):
            parser.add_argument(flag, type=default, required=True, help=text)
        elif isinstance(default, list):
            parser.add_argument(flag, nargs="+", default=default, help=text or " ".join(default))
        else:
            parser.add_argument(flag, type=type(default), default=default, help=text or str(default))
    return parser.parse_args(args)


def header(*names: str) -> None:
    """The first two lines of a Markdown table whose columns, but the first, are numbers."""
    row(*names)
    print(f"|{'|'.join(['---', *['---:'] * (len(names) - 1)])}|")


def row(*cells: object) -> None:
    """A line of a Markdown table, at once."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def take_turns(runs: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each run in each round, after one for warming up: a busy machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def medians(values: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each list."""
    return {name: statistics.median(numbers) for name, numbers in values.items()}


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process in memory, now (VmRSS) or at most so far (VmHWM); from /proc, so on Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def leaves(value: Any) -> Iterator[Any]:
    """Keys and values of nested dicts and lists."""
    if isinstance(value, dict):
        value = [entry for item in value.items() for entry in item]
    if isinstance(value, (list, tuple)):
        for entry in value:
            yield from leaves(entry)
    else:
        yield value


def on_device(batches: Iterable[dict[str, Tensor]], device: str) -> list[dict[str, Tensor]]:
    """Batches on a device."""
    return [{name: value.to(device) for name, value in batch.items()} for batch in batches]


def digits_or_folder(root: str, digits: dict[str, Any], folder: dict[str, Any], **both: Any) -> ShiftedDataModule:
    """ROOT/test/<class>/* under ImageNet-C's functions at severity 1; without a root the digits at severity 5."""
    data: ShiftedDataModule
    if root:
        data = FolderData(root, **{"function_set": "imagenet_c", "severity": 1, **folder, **both})
    else:
        data = DigitsData(**{"severity": 5, **digits, **both})
    data.setup("predict")
    return data


def positions_of(data: ShiftedDataModule, batch: Mapping[str, Any]) -> list[int]:
    """Where the images of a batch stand among all test images: its ``index`` counts those in use, domain by domain."""
    used = subset(len(data.clean("test")), data.num_images)
    return used[torch.as_tensor(batch["index"]) % len(used)].tolist()


def predict(
    method: Callable[[nn.Module], Any], data: Any, *callbacks: Callback, source: Any = None, **options: Any
) -> dict[str, Any]:
    """A quiet predict run on the CPU; returns its report.

    Args:
        method: Called with the net.
        data: A data module, or a loader.
        *callbacks: Of the trainer.
        source: Source batches for a method that needs them, where ``data`` has none.
        **options: Of TestTimeAdaptation.
    """
    module = TestTimeAdaptation(method, **options)
    if source is not None and not module.method.prepared:
        module.method.prepare(source)
    with tempfile.TemporaryDirectory() as place:
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=place,
            callbacks=list(callbacks),
        )
        trainer.predict(module, data, return_predictions=False)
        (report,) = Path(place).rglob("report.json")  # wherever a run writes
        return dict(json.loads(report.read_text()))
