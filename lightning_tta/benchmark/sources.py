"""The source models of a benchmark: which there are, where they lie, and their training."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from lightning_tta.benchmark.config import NetConfig
from lightning_tta.launch.lightning import run_lightning
from lightning_tta.modules.loading import find_checkpoint

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
        """The weights of a net, which was trained if it has to be."""
        config = self.nets[net]
        return str(find_checkpoint(self.directory(net, seed))) if config.fit else config.source_ckpt

    def directory(self, net: str, seed: int) -> Path:
        """Where a training writes."""
        config = self.nets[net]
        text = Path(str(config.fit)).read_text()
        if config.options:
            text += json.dumps(config.options, sort_keys=True)
        if config.start is not None:
            text += self._start(config.start, seed)
        return self.output / "sources" / f"{net}-seed{seed}-{digest(text)}"

    def _start(self, net: str, seed: int) -> str:
        return str(self.directory(net, seed) if self.nets[net].fit else self.nets[net].source_ckpt)

    def train(self, source: Source) -> None:
        """Train one net, unless it was."""
        net, seed = source
        config, directory = self.nets[net], self.directory(net, seed)
        if (directory / "done").exists():
            return
        shutil.rmtree(directory, ignore_errors=True)  # a training that was cut off
        options = {
            "seed_everything": seed,
            "trainer.logger.init_args.save_dir": str(directory.parent),
            "trainer.logger.init_args.name": directory.name,
            "trainer.logger.init_args.version": "fit",
            "trainer.enable_progress_bar": False,
            **config.options,
            **({"model.source_ckpt": self._start(config.start, seed)} if config.start is not None else {}),
        }
        texts = [f"--{name}={v if isinstance(v, str) else json.dumps(v)}" for name, v in options.items()]
        run_lightning(["fit", "--config", str(config.fit), *texts])
        (directory / "done").touch()


def digest(text: str) -> str:
    """Eight hex digits that identify a configuration."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]
