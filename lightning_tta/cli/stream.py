"""A stream before it is run: a list of its batches, and a picture of its classes and domains over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_tta.data.base import ShiftedDataModule
from lightning_tta.errors import ConfigError

_COLUMNS = 200  # of the picture, at most


def list_stream(data: ShiftedDataModule) -> list[dict[str, Any]]:
    """What comes in each batch.

    Returns:
        For each batch ``batch``, ``images``, ``domains`` (name -> images), ``classes`` (how many different) and
        ``largest_class`` (the share of the most frequent class, 0 to 1).
    """
    names, (label, domain) = data.stream_domains, _columns(data)
    rows, start = [], 0
    for number, batch in enumerate(data.stream.batches):
        here = slice(start, start + len(batch))
        found, counts = np.unique(label[here], return_counts=True)
        domains, sizes = np.unique(domain[here], return_counts=True)
        rows.append(
            {
                "batch": number,
                "images": len(batch),
                "domains": {names[d]: int(size) for d, size in zip(domains, sizes, strict=True)},
                "classes": len(found),
                "largest_class": float(counts.max() / len(batch)),
            }
        )
        start += len(batch)
    return rows


def _columns(data: ShiftedDataModule) -> tuple[Any, Any]:
    """Label and domain of each sample, in the order of the stream."""
    labels = torch.cat([images.labels for _, images in data.stream_parts]).numpy()
    order = [position for batch in data.stream.batches for position in batch]
    return labels[order], data.stream.domain_of(order)


def check_picture(path: str | Path) -> None:
    """Refuse a name that :func:`draw_stream` would refuse, before the stream is read.

    Raises:
        ConfigError: If it is not of a picture.
    """
    if Path(path).suffix not in (".png", ".svg"):
        raise ConfigError(f"The picture goes to a .png or .svg file; got {str(path)!r}.")


def draw_stream(data: ShiftedDataModule, path: str | Path) -> Path:
    """Draw classes (above) and domains (below) over the stream: the darker, the more of the samples at that time.

    Args:
        data: The data module; what it needs is read.
        path: Where the picture goes, ``.png`` or ``.svg``.

    Returns:
        The path.

    Raises:
        ConfigError: If the path is of something else.
    """
    check_picture(path)
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot as plt

    label, domain = _columns(data)
    names = data.stream_domains
    columns = min(_COLUMNS, len(label))
    place = np.arange(len(label)) * columns // len(label)
    figure, (above, below) = plt.subplots(
        2,
        1,
        sharex=True,
        figsize=(9, 2.2 + 0.16 * min(data.num_classes, 30) + 0.18 * min(len(names), 40)),
        gridspec_kw={"height_ratios": [min(data.num_classes, 30), max(2, min(len(names), 40))]},
        layout="constrained",
    )
    for axis, values, count in ((above, label, data.num_classes), (below, domain, len(names))):
        share = np.zeros((count, columns))
        known = values >= 0
        np.add.at(share, (values[known], place[known]), 1)
        share /= np.maximum(np.bincount(place, minlength=columns), 1)
        extent = (0, len(label), count - 0.5, -0.5)
        # The square root, so that ten classes in equal shares are a visible grey, and one alone is black.
        axis.imshow(share**0.5, aspect="auto", cmap="Greys", vmin=0, vmax=1, interpolation="nearest", extent=extent)
    for axis, texts, title in ((above, data.class_names, "class"), (below, names, "domain")):
        shown = range(0, len(texts), max(1, -(-len(texts) // 40)))
        axis.set_yticks(list(shown), [texts[number] for number in shown], fontsize=7)
        axis.set_ylabel(title)
    below.set_xlabel("samples seen")
    stream = data.stream
    above.set_title(
        f"{data.name}: {data.stream_kind} stream of {len(label):,} samples in {len(stream.batches):,} batches of "
        f"{data.batch_size}, order seed {data.order_seed}",
        fontsize=9,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
