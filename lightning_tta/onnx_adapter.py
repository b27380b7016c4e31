"""Runs a method that was exported with its adaptation, where there is no torch: onnxruntime and NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_tta.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

BEFORE, AFTER = "state.", "next."
"""What the names of state begin with: of an input of the file, and of the output that takes its place."""


class OnnxAdapter:
    """Hands the state that one batch leaves to the next one.

    Args:
        path: A file of ``lightning_tta.save(method, path, adapting=True)``, or its content.
        providers: Of onnxruntime, such as ``["CPUExecutionProvider"]``, the default.

    Attributes:
        state: Arrays by the name of the file's input; empty at the start, where the file has the values itself. Can be
            saved (``numpy.savez``) and put back.

    Raises:
        ConfigError: If onnxruntime is missing, or the file has no such input and outputs.
    """

    def __init__(self, path: str | Path | bytes, providers: Sequence[str] = ("CPUExecutionProvider",)) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ConfigError("OnnxAdapter needs onnxruntime: pip install 'lightning-tta[onnx]'.") from error
        content = path if isinstance(path, bytes) else str(path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns of each input that has a value of its own
        self.session: Any = onnxruntime.InferenceSession(content, options, providers=list(providers))
        self._outputs = [output.name for output in self.session.get_outputs()]
        if "logits" not in self._outputs or [value.name for value in self.session.get_inputs()] != ["images"]:
            raise ConfigError(
                f"This is no file of lightning_tta.save(method, path, adapting=True): it gives {self._outputs}, and "
                "should take 'images' and give 'logits'."
            )
        self.state: dict[str, np.ndarray[Any, Any]] = {}

    def __call__(self, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Adapt on a batch and predict it.

        Args:
            images: (B, C, H, W), float32, finite pixels in [0, 1].

        Returns:
            Logits (B, K), float32.
        """
        values = dict(zip(self._outputs, self.session.run(None, {"images": images, **self.state}), strict=True))
        logits: np.ndarray[Any, Any] = values.pop("logits")
        self.state = {name.replace(AFTER, BEFORE, 1): value for name, value in values.items()}
        return logits

    def reset(self) -> None:
        """Back to the state that is in the file."""
        self.state = {}
