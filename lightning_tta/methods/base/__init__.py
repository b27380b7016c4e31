"""The contract under every method."""

from lightning_tta.methods.base.gradient import GradientMethod
from lightning_tta.methods.base.method import TTAMethod

__all__ = ["GradientMethod", "TTAMethod"]
