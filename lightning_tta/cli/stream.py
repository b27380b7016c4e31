"""A stream before it is run: what comes in each of its batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lightning_tta.data import ShiftedDataModule
from lightning_tta.errors import ConfigError
from lightning_tta.report.tables import said

SHOWN = 20
FILES = 3  # of a batch


def list_stream(data: ShiftedDataModule) -> list[dict[str, Any]]:
    """What comes in each batch.

    Returns:
        For each batch ``batch``, ``images``, ``domains`` (name -> images), ``classes`` (how many different),
        ``largest_class`` (the share of the most frequent class, 0 to 1), both ``None`` without labels, and ``files``,
        the first names of files where there are some.
    """
    labels = torch.cat([images.labels for _, images in data.stream_images]).numpy()
    rows, names = [], data.stream_domains
    for number, batch in enumerate(data.stream.batches):
        positions = list(batch)
        known = labels[positions][labels[positions] >= 0]
        classes, counts = np.unique(known, return_counts=True)
        domains, sizes = np.unique(data.stream.domain_of(positions), return_counts=True)
        rows.append(
            {
                "batch": number,
                "images": len(positions),
                "domains": {names[d]: int(size) for d, size in zip(domains, sizes, strict=True)},
                "classes": len(classes) if len(known) else None,
                "largest_class": float(counts.max() / len(known)) if len(known) else None,
                "files": [name for name in map(data.file_of, positions[:FILES]) if name],
            }
        )
    return rows


def print_stream(data: Any) -> None:
    """Print what the stream is, and its first batches.

    Raises:
        ConfigError: If the data module is not one of this package, whose streams alone are known before they run.
    """
    if not isinstance(data, ShiftedDataModule):
        raise ConfigError(
            f"{type(data).__name__} has no stream to list. Give a data module of images, such as DigitsData."
        )
    rows, description = list_stream(data), data.describe()
    print(f"{data.name}: {description['stream']} stream, {description['images']:,} images, {len(rows):,} batches")
    settings = {key: value for key, value in description.items() if key != "domains" and value is not None}
    settings["images_per_domain"] = said(settings["images_per_domain"])
    print(", ".join(f"{key} {value}" for key, value in settings.items()))
    named = any(row["files"] for row in rows)
    head = "  domains" + ("; first files" if named else "")
    print(f"order {data.stream.digest}\n\nbatch images classes largest class %{head}")
    for row in rows[:SHOWN]:
        domains = ", ".join(f"{name} {count}" for name, count in list(row["domains"].items())[:4])
        more = ", ..." if len(row["domains"]) > 4 else ""
        classes = "-" if row["classes"] is None else row["classes"]
        share = "-" if row["largest_class"] is None else f"{100 * row['largest_class']:.0f}"
        files = f"; {', '.join(row['files'])}" if row["files"] else ""
        print(f"{row['batch']:5} {row['images']:6} {classes:>7} {share:>15}  {domains}{more}{files}")
    if len(rows) > SHOWN:
        print(f"... and {len(rows) - SHOWN} more")
