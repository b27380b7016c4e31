"""The LightningModules: source training, meta-training, and adaptation at test time."""

from lightning_tta.modules.adaptation import TestTimeAdaptation
from lightning_tta.modules.dense_source import SourceRegressor, SourceSegmenter
from lightning_tta.modules.language import LanguageAdaptation
from lightning_tta.modules.language_source import SourceLanguageModel
from lightning_tta.modules.meta_ttt import MetaTTT
from lightning_tta.modules.perk import PERK
from lightning_tta.modules.source import SourceClassifier

__all__ = [
    "PERK",
    "LanguageAdaptation",
    "MetaTTT",
    "SourceClassifier",
    "SourceLanguageModel",
    "SourceRegressor",
    "SourceSegmenter",
    "TestTimeAdaptation",
]
