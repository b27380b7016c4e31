"""Messages of other libraries that say nothing to the user of a command, each with the reason why it may go.

Only these, by their own words: warnings of the user's own code, and of this package, are shown.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LOGGED = {
    r"💡 Tip: ": "an advert",
    r"GPU available: False, used: False": "the report names the device",
    r"[TH]PU available: False": "the same",
    r"LOCAL_RANK: \d+ - CUDA_VISIBLE_DEVICES": "the same",
    r"You are using a CUDA device .* that has Tensor Cores": "less precise products would change predictions",
    r"Initializing distributed: GLOBAL_RANK": "the bar and the report say how many processes there are",
    r"-+\ndistributed_backend=": "the same",
    r"(\[rank: \d+\] )?Seed set to ": "config.yaml and the protocol hold the seed",
    r"`Trainer\.\w+` stopped: `max_(epochs|steps)=": "the end of a fit says where its weights are",
    r"(\[rank: \d+\] )?Received SIGTERM: ": "the command says itself how it ended",
    r"SLURM auto-requeueing enabled": "asked for by the configuration",
}
"""Beginnings of messages that Lightning logs."""
WARNED = {
    r".*isinstance\(treespec, LeafSpec\)": "Lightning's own use of torch",
    r"(?s).*skip_none parameter was deprecated": "Lightning's own use of jsonargparse",
    r"LightningCLI's args parameter": "tests, notebooks and the benchmark parse beside another command line",
    r".*does not have many workers": "the loaders of this package have no slow work to share, or an option for it",
    r"The number of training batches .* is smaller than the logging interval": "no curve is lost: epochs are logged",
    r"predict returned None if it was on purpose": "a batch that was done before the run went on",
    r"(?s)Checkpoint directory .* exists and is not empty": "the directory of a training that goes on",
    r"The dirpath has changed from ": "a training that goes on has a directory of its own",
}
"""Beginnings of warnings, as regular expressions."""


class _Filter(logging.Filter):
    """Holds back what :data:`LOGGED` names."""

    pattern = re.compile("|".join(LOGGED))

    def filter(self, record: logging.LogRecord) -> bool:
        return self.pattern.match(record.getMessage()) is None


@contextmanager
def without_noise() -> Iterator[None]:
    """While this lasts, what the tables name is not shown."""
    noise = _Filter()
    handlers = [
        handler
        for name in ("", "lightning", "lightning.pytorch", "lightning.fabric")
        for handler in logging.getLogger(name).handlers
    ]
    for handler in handlers:
        handler.addFilter(noise)
    try:
        with warnings.catch_warnings():
            for message in WARNED:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(noise)
