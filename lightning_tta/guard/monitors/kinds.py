"""All monitors by name, and how one is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_tta.guard.monitors.aetta import AettaMonitor
from lightning_tta.guard.monitors.agreement import SourceAgreement, ViewAgreement
from lightning_tta.guard.monitors.base import Monitor
from lightning_tta.guard.monitors.collapse import Collapse
from lightning_tta.guard.monitors.confidence import ATC, Confidence, DifferenceOfConfidences
from lightning_tta.guard.monitors.consensus import Consensus
from lightning_tta.guard.monitors.drift import Drift
from lightning_tta.guard.monitors.labels import LabelsMonitor
from lightning_tta.guard.monitors.poem import Poem
from lightning_tta.methods.components.wanted import Wanted, listed, read

MONITORS: dict[str, type[Monitor]] = {
    "aetta": AettaMonitor,
    "atc": ATC,
    "collapse": Collapse,
    "confidence": Confidence,
    "consensus": Consensus,
    "doc": DifferenceOfConfidences,
    "drift": Drift,
    "labels": LabelsMonitor,
    "poem": Poem,
    "source_agreement": SourceAgreement,
    "view_agreement": ViewAgreement,
}


def make_monitors(wanted: Wanted | Sequence[Wanted] | None) -> list[Monitor]:
    """Monitors from words, or dicts of ``kind`` and its options; one of them, or a list.

    Raises:
        ConfigError: If there is no such monitor, or option of it.
    """
    chosen: list[tuple[str, dict[str, Any]]] = [read(each, "monitors", MONITORS) for each in listed(wanted)]
    return [MONITORS[kind](**options) for kind, options in chosen]
