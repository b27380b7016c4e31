"""Classifiers by name, pixels in and logits out, with their weights and normalisation."""

from lightning_tta.backbones.create import Backbone, create_backbone, list_backbones, load_weights
from lightning_tta.backbones.weights import state_digest

__all__ = ["Backbone", "create_backbone", "list_backbones", "load_weights", "state_digest"]
