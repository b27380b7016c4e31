"""What all sets of image files have in common."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning_tta.data.base import ShiftedDataModule
from lightning_tta.data.file_images import FileImages, Listing
from lightning_tta.data.reading import MAX_PIXELS
from lightning_tta.data.storage.contents import content_lines
from lightning_tta.errors import check_choice, check_range


class FileData(ShiftedDataModule):
    """What data modules of image files have in common.

    Args:
        channels: 3 for RGB, 1 for grey; files of the other kind are converted. By default what the net of a predict run
            says that it takes, else 3.
        max_pixels: Images with more pixels than this are refused before they are decoded, as a small file can claim a
            size that fills the memory.
        **kwargs: Stream, domains, batch sizes: the arguments of :class:`ShiftedDataModule`.
    """

    def __init__(self, *, channels: Literal[1, 3] | None = None, max_pixels: int = MAX_PIXELS, **kwargs: Any) -> None:
        check_choice("channels", channels, (None, 1, 3))
        check_range("max_pixels", max_pixels, 1, integer=True)
        self.channels, self.max_pixels = channels, max_pixels
        self._net: dict[str, Any] = {}
        super().__init__(**kwargs)

    def setup(self, stage: str) -> None:
        """Ask the net of a predict run what it takes; then read what the stage needs."""
        if stage == "predict":
            module = getattr(self.trainer, "lightning_module", None)
            preprocessing = dict(getattr(module, "preprocessing", None) or {})
            self.fit_to_net({**preprocessing, **dict(getattr(module, "net_info", None) or {})})
        super().setup(stage)

    def fit_to_net(self, net: Mapping[str, Any]) -> None:
        """Take what is left open from a net's preprocessing: ``input_size`` (C, H, W), ``crop_pct``, ..."""
        if dict(net) != self._net:
            self._net = dict(net)
            self.forget()

    @property
    def _channels(self) -> int:
        size = self._net.get("input_size")
        return self.channels or (size[0] if size and size[0] in (1, 3) else 3)

    def file_images(
        self,
        listing: Listing,
        resize: int | None,
        crop: int | None,
        root: Path,
        like: Path | None = None,
        interpolation: str = "bilinear",
    ) -> FileImages:
        """The images of a listing; ``root`` is left out of their files' names."""
        return FileImages(
            *listing,
            resize,
            crop,
            like,
            root=root,
            channels=self._channels,
            max_pixels=self.max_pixels,
            interpolation=interpolation,
        )

    def file_lines(self, domain: str, paths: Sequence[Path], root: Path) -> Iterator[bytes]:
        """What the digest says of files: names, sizes and contents."""
        return content_lines(domain, paths, root, self.cache)

    @property
    def kind(self) -> str:
        """What the digest says of ``channels``."""
        return "|grey" if self._channels == 1 else ""
