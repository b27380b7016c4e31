"""Frames of a video file, decoded in order. Needs the extra ``video``."""

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tta.data.file_images import DecodedImages, fit_size
from lightning_tta.errors import ConfigError, DataError


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ConfigError("Videos need the package av: pip install 'lightning-tta[video]'.") from error
    return av


class VideoFrames(DecodedImages):
    """Every ``every``-th frame of a video, without labels; resized and cut as image files are.

    Frames are cheap in order. To go back, the video is decoded from its beginning.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        every: int,
        resize: int | None,
        crop: int | None,
        channels: int = 3,
        interpolation: str = "bilinear",
    ) -> None:
        self.path, self.name, self.every, self.resize, self.crop = path, name, every, resize, crop
        self.channels, self.interpolation = channels, interpolation
        self._frames: Generator[Any, None, None] | None = None
        self._process, self._left = os.getpid(), list[Any]()
        self._next, self._end = 0, count_frames(path)
        self.labels = torch.full((-(-self._end // every),), -1)
        self._shape = tuple(self.image(0).shape)
        self._close()

    def _close(self) -> None:
        """Close the file: a decoder's threads must not be alive when worker processes are forked."""
        if self._frames is not None:
            self._frames.close()
        self._frames, self._next = None, 0

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the first frame."""
        return self._shape

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_frames": None, "_left": [], "_next": 0}  # each worker process opens the file itself

    def image(self, position: int) -> Tensor:
        """One frame."""
        number = position * self.every
        if number >= self._end:
            raise DataError(f"{self.path} cannot be decoded from frame {self._end} on. Repair it, or cut it off there.")
        if self._process != os.getpid():  # a forked decoder has lost its threads: to close it would wait for ever
            self._left.append(self._frames)
            self._process, self._frames = os.getpid(), None
        if self._frames is None or number < self._next:
            self._close()
            self._frames = self._decoded()
        try:
            while self._next <= number:
                frame = next(self._frames)
                self._next += 1
        except Exception as error:  # FFmpeg's errors, or the end
            self._end, self._frames = self._next, None
            raise DataError(f"{self.path} cannot be decoded from frame {self._end} on ({error}).") from error
        pixels = torch.from_numpy(frame.to_ndarray(format="gray" if self.channels == 1 else "rgb24"))
        pixels = pixels.view(*pixels.shape[:2], self.channels).permute(2, 0, 1)
        turns = round(getattr(frame, "rotation", 0) / 90) % 4  # counterclockwise, as a phone has noted it
        pixels = torch.rot90(pixels, turns, dims=(1, 2)).contiguous()
        return fit_size(pixels, self.resize, self.crop, self.file(position), self.interpolation)

    def _decoded(self) -> Generator[Any, None, None]:
        with _av().open(str(self.path)) as container:
            yield from container.decode(video=0)

    def file(self, position: int) -> str:
        """Name of the file, and number of the frame in it."""
        return f"{self.name}#frame={position * self.every}"


def count_frames(path: Path) -> int:
    """How many frames a video has; nothing is decoded.

    Raises:
        DataError: If it cannot be read, or has none.
    """
    if not path.is_file():
        raise DataError(f"The video {path} does not exist. Check the path.")
    try:
        with _av().open(str(path)) as container:
            packets = container.demux(video=0)
            count = sum(1 for packet in packets if packet.size and not getattr(packet, "is_discard", False))
    except ConfigError:
        raise
    except Exception as error:  # FFmpeg's errors; IndexError without a video stream
        raise DataError(f"Cannot read the video {path}: {error}. Replace or convert the file.") from error
    if not count:
        raise DataError(f"The video {path} has no frames. Replace the file.")
    return count
