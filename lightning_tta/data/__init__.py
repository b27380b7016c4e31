"""Source data, shifted domains, test streams and the protocol."""

from inspect import isabstract

from lightning.pytorch import LightningDataModule

from lightning_tta.data.base import ShiftedDataModule
from lightning_tta.data.corruptions.corrupt import corrupt, corruption_names
from lightning_tta.data.dense.angles import DigitAnglesData
from lightning_tta.data.dense.base import DenseData
from lightning_tta.data.dense.folders import SegmentationFolderData
from lightning_tta.data.dense.shapes import ShapesData
from lightning_tta.data.protocol import Protocol
from lightning_tta.data.recall import RecallData
from lightning_tta.data.sets.arrays import ArrayData
from lightning_tta.data.sets.cifar import CIFARData
from lightning_tta.data.sets.digits import DigitsData
from lightning_tta.data.sets.domains import DomainFolderData
from lightning_tta.data.sets.folder import FolderData
from lightning_tta.data.sets.imagenet import ImageNetData
from lightning_tta.data.sets.unlabelled import ImageFolderData
from lightning_tta.data.streams import STREAM_KINDS, Stream, StreamKind, build_stream, default_reset
from lightning_tta.data.text.prompt_data import PromptData

__all__ = [
    "STREAM_KINDS",
    "ArrayData",
    "CIFARData",
    "DenseData",
    "DigitAnglesData",
    "DigitsData",
    "DomainFolderData",
    "FolderData",
    "ImageFolderData",
    "ImageNetData",
    "PromptData",
    "Protocol",
    "RecallData",
    "SegmentationFolderData",
    "ShapesData",
    "ShiftedDataModule",
    "Stream",
    "StreamKind",
    "build_stream",
    "corrupt",
    "corruption_names",
    "data_modules",
    "default_reset",
    "every_data_module",
]


def every_data_module() -> dict[str, type[LightningDataModule]]:
    """The data modules that a command may name, by name."""
    classes = {name: value for name, value in globals().items() if name in __all__ and isinstance(value, type)}
    return {n: c for n, c in classes.items() if issubclass(c, LightningDataModule) and not isabstract(c)}


def data_modules() -> dict[str, type[ShiftedDataModule]]:
    """Those of images, by name."""
    return {name: kind for name, kind in every_data_module().items() if issubclass(kind, ShiftedDataModule)}
