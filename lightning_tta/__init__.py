"""lightning_tta: test-time adaptation of image classifiers in PyTorch Lightning.

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
    ConfigError,
    DataError,
    FinishedError,
    InputError,
    LightningTTAError,
    NotPreparedError,
    UnsupportedModelError,
    WeightsError,
)

if TYPE_CHECKING:
    from lightning_tta.backbones import Backbone, create_backbone
    from lightning_tta.data import (
        ArrayData,
        CIFARData,
        DigitsData,
        DomainFolderData,
        FolderData,
        ImageNetData,
        Protocol,
        ShiftedDataModule,
    )
    from lightning_tta.exporting import export
    from lightning_tta.guard.callback import Guard
    from lightning_tta.guard.watch import Watch
    from lightning_tta.methods import TTAMethod, adapt, available_methods
    from lightning_tta.modules import MetaTTT, SourceClassifier, TestTimeAdaptation

_LAZY = {  # imported on first use: `import lightning_tta` stays fast
    "adapt": "methods",
    "export": "exporting",
    "Backbone": "backbones",
    "create_backbone": "backbones",
    "ArrayData": "data",
    "CIFARData": "data",
    "DigitsData": "data",
    "DomainFolderData": "data",
    "FolderData": "data",
    "ImageNetData": "data",
    "Guard": "guard.callback",
    "Protocol": "data",
    "ShiftedDataModule": "data",
    "TTAMethod": "methods",
    "available_methods": "methods",
    "MetaTTT": "modules",
    "SourceClassifier": "modules",
    "TestTimeAdaptation": "modules",
    "Watch": "guard.watch",
}

__all__ = [
    "ArrayData",
    "Backbone",
    "CIFARData",
    "ConfigError",
    "DataError",
    "DigitsData",
    "DomainFolderData",
    "FinishedError",
    "FolderData",
    "Guard",
    "ImageNetData",
    "InputError",
    "LightningTTAError",
    "MetaTTT",
    "NotPreparedError",
    "Protocol",
    "ShiftedDataModule",
    "SourceClassifier",
    "TTAMethod",
    "TestTimeAdaptation",
    "UnsupportedModelError",
    "Watch",
    "WeightsError",
    "__version__",
    "adapt",
    "available_methods",
    "create_backbone",
    "export",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
