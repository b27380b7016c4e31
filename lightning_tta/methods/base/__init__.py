"""The contract under every method."""

from lightning_tta.methods.base.method import TTAMethod

__all__ = ["TTAMethod"]
