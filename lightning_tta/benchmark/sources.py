"""The source models of a benchmark: which there are, where they lie, and their training."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_tta.benchmark.config import NetConfig
from lightning_tta.launch.lightning import run_lightning

Source = tuple[str, int]  # net's label, seed


class Sources:
    """Trains the nets of a benchmark once per seed, into directories named by a hash of their configuration."""

    def __init__(self, output: Path, nets: Mapping[str, NetConfig]) -> None:
        self.output, self.nets = output, nets

    def stages(self, used: set[Source]) -> tuple[list[Source], list[Source]]:
        """What must be trained for these: first the nets that start from nothing, then those that start from them."""
        wanted = {(net, seed) for net, seed in used if self.nets[net].fit}
        wanted |= {(start, seed) for net, seed in wanted if (start := self.nets[net].start) and self.nets[start].fit}
        first = {source for source in wanted if self.nets[source[0]].start is None}
        return sorted(first), sorted(wanted - first)

    def weights(self, net: str, seed: int) -> str | None:
        """Where the weights of a net are, or will be."""
        config = self.nets[net]
        return str(self.directory(net, seed)) if config.fit else config.source_ckpt

    def directory(self, net: str, seed: int) -> Path:
        """Where a training writes."""
        config = self.nets[net]
        assert config.fit is not None
        text = Path(config.fit).read_text()
        if config.options:
            text += json.dumps(config.options, sort_keys=True)
        if config.start is not None:
            text += str(self.weights(config.start, seed))
        return self.output / "sources" / f"{net}-seed{seed}-{digest(text)}"

    def train(self, source: Source) -> None:
        """Train one net, unless it was."""
        net, seed = source
        config, directory = self.nets[net], self.directory(net, seed)
        if (directory / "done").exists():
            return
        shutil.rmtree(directory, ignore_errors=True)  # a training that was cut off
        logger = "--trainer.logger.init_args."
        place = [f"{logger}save_dir={directory.parent}", f"{logger}name={directory.name}", f"{logger}version=fit"]
        options = [f"--{name}={_as_argument(value)}" for name, value in config.options.items()]
        if config.start is not None:
            options.append(f"--model.source_ckpt={self.weights(config.start, seed)}")
        quiet = ["--trainer.enable_progress_bar=false"]
        run_lightning(["fit", "--config", str(config.fit), f"--seed_everything={seed}", *place, *quiet, *options])
        (directory / "done").touch()


def digest(text: str) -> str:
    """Eight hex digits that identify a configuration."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _as_argument(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
