"""The LightningModules: source training, and adaptation at test time."""

from lightning_tta.modules.source import SourceClassifier
from lightning_tta.modules.test_time import TestTimeAdaptation

__all__ = ["SourceClassifier", "TestTimeAdaptation"]
