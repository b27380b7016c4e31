"""Small transformers of other libraries, with random weights, for 5 classes."""

import pytest
from torch import nn


def timm_vit(**options):
    timm = pytest.importorskip("timm")
    return timm.models.VisionTransformer(
        **{"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5, **options}
    )


def torchvision_vit():
    models = pytest.importorskip("torchvision.models")
    net = models.VisionTransformer(16, 4, 3, 2, 16, 32, num_classes=5)
    nn.init.normal_(net.heads.head.weight)  # zeros by default
    return net


def hf_vit():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=5)
    )


def swin():
    timm = pytest.importorskip("timm")
    sizes = {"embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4}
    return timm.models.SwinTransformer(img_size=32, patch_size=4, num_classes=5, **sizes)


def relative_positions():
    timm = pytest.importorskip("timm")
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.models.Beit(img_size=16, patch_size=4, use_rel_pos_bias=True, use_abs_pos_emb=False, **sizes)


def mixer():
    timm = pytest.importorskip("timm")
    return timm.models.MlpMixer(img_size=16, patch_size=4, num_blocks=2, embed_dim=16, num_classes=5)
