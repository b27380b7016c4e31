"""lightning_tta: test-time adaptation of nets over images, tokens, pixels and values in PyTorch Lightning.

Three lines of PyTorch::

    method = lightning_tta.adapt(model, "zerosiam")
    logits = method(images)  # pixels in [0, 1]; adapts on the way
    method.reset()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_tta._version import __version__
from lightning_tta.errors import (
    AnswerTimeoutError,
    CellsFailedError,
    ClosedError,
    ConfigError,
    DataError,
    FinishedError,
    InputError,
    LightningTTAError,
    NotPreparedError,
    QueueFullError,
    UnsupportedModelError,
    WeightsError,
)

if TYPE_CHECKING:  # for type checkers, what __getattr__ below imports on first use
    from lightning_tta.backbones import Backbone, create_backbone
    from lightning_tta.choosing.choice import Choice, choose
    from lightning_tta.data import (
        ArrayData,
        CIFARData,
        DigitAnglesData,
        DigitsData,
        DomainFolderData,
        FolderData,
        ImageFolderData,
        ImageNetData,
        PromptData,
        Protocol,
        SegmentationFolderData,
        ShapesData,
        ShiftedDataModule,
    )
    from lightning_tta.data.recall import RecallData
    from lightning_tta.diagnosis import Diagnosis, doctor
    from lightning_tta.exporting import export, save
    from lightning_tta.guard.callback import Guard
    from lightning_tta.guard.watch import Watch
    from lightning_tta.methods import TTAMethod, adapt, available_methods
    from lightning_tta.methods.base.answering import answer
    from lightning_tta.modules import (
        PERK,
        LanguageAdaptation,
        MetaTTT,
        SourceClassifier,
        SourceLanguageModel,
        SourceRegressor,
        SourceSegmenter,
        TestTimeAdaptation,
    )
    from lightning_tta.onnx_adapter import OnnxAdapter
    from lightning_tta.run.batches import StreamInput
    from lightning_tta.run.board import StreamBoard
    from lightning_tta.run.outputs import StreamReport
    from lightning_tta.run.resume import StateKeeper
    from lightning_tta.serving.shadow import Shadow

__all__ = [
    "PERK",
    "AnswerTimeoutError",
    "ArrayData",
    "Backbone",
    "CIFARData",
    "CellsFailedError",
    "Choice",
    "ClosedError",
    "ConfigError",
    "DataError",
    "Diagnosis",
    "DigitAnglesData",
    "DigitsData",
    "DomainFolderData",
    "FinishedError",
    "FolderData",
    "Guard",
    "ImageFolderData",
    "ImageNetData",
    "InputError",
    "LanguageAdaptation",
    "LightningTTAError",
    "MetaTTT",
    "NotPreparedError",
    "OnnxAdapter",
    "PromptData",
    "Protocol",
    "QueueFullError",
    "RecallData",
    "SegmentationFolderData",
    "Shadow",
    "ShapesData",
    "ShiftedDataModule",
    "SourceClassifier",
    "SourceLanguageModel",
    "SourceRegressor",
    "SourceSegmenter",
    "StateKeeper",
    "StreamBoard",
    "StreamInput",
    "StreamReport",
    "TTAMethod",
    "TestTimeAdaptation",
    "UnsupportedModelError",
    "Watch",
    "WeightsError",
    "__version__",
    "adapt",
    "answer",
    "available_methods",
    "choose",
    "create_backbone",
    "doctor",
    "export",
    "save",
]
_HOMES = {
    "backbones": ("Backbone", "create_backbone"),
    "choosing.choice": ("Choice", "choose"),
    "data": (
        *("ArrayData", "CIFARData", "DigitsData", "DomainFolderData", "FolderData", "ImageNetData"),
        *("DigitAnglesData", "ImageFolderData", "PromptData", "Protocol", "SegmentationFolderData", "ShapesData"),
        "ShiftedDataModule",
    ),
    "diagnosis": ("Diagnosis", "doctor"),
    "exporting": ("export", "save"),
    "guard.callback": ("Guard",),
    "guard.watch": ("Watch",),
    "onnx_adapter": ("OnnxAdapter",),
    "run.board": ("StreamBoard",),
    "run.batches": ("StreamInput",),
    "run.outputs": ("StreamReport",),
    "run.resume": ("StateKeeper",),
    "serving.shadow": ("Shadow",),
    "methods": ("TTAMethod", "adapt", "available_methods"),
    "methods.base.answering": ("answer",),
    "data.recall": ("RecallData",),
    "modules": (
        *("PERK", "LanguageAdaptation", "MetaTTT", "SourceClassifier", "SourceLanguageModel"),
        *("SourceRegressor", "SourceSegmenter", "TestTimeAdaptation"),
    ),
}


def __getattr__(name: str) -> Any:
    """A public name, imported on first use, so that ``import lightning_tta`` takes no time."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
