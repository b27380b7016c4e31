"""The auxiliaries by the words that name them."""

from __future__ import annotations

from lightning_tta.auxiliary.base import Auxiliary
from lightning_tta.auxiliary.consistency import Consistency
from lightning_tta.auxiliary.contrastive import Contrastive
from lightning_tta.auxiliary.rotation import Rotation

KINDS: dict[str, type[Auxiliary]] = {kind.kind: kind for kind in (Rotation, Contrastive, Consistency)}
