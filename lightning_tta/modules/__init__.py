"""The LightningModules: source training, meta-training, and adaptation at test time."""

from lightning_tta.modules.meta_ttt import MetaTTT
from lightning_tta.modules.source import SourceClassifier
from lightning_tta.modules.test_time import TestTimeAdaptation

__all__ = ["MetaTTT", "SourceClassifier", "TestTimeAdaptation"]
