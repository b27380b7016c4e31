"""Blocks of real architectures, found by structure; what is read from their outputs and written back."""

import importlib.util

import pytest
import timm
import torch
import torchvision
from torch import nn

from lightning_tta import UnsupportedModelError
from lightning_tta.backbones.blocks import Block, changed_blocks, find_blocks
from nets import make_images, make_net, max_difference

VIT = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}


def huggingface(kind, **options):
    import transformers

    return getattr(transformers, f"{kind}ForImageClassification")(getattr(transformers, f"{kind}Config")(**options))


def torchvision_vit():
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32
    )


def torchvision_swin():
    return torchvision.models.SwinTransformer([2, 2], 8, [1, 1], [2, 2], [4, 4])


NETS = {  # names of the first block and the last one, how many there are, how they lie, whether the first token counts
    "timm ViT": (lambda: timm.create_model("test_vit"), "blocks.0", "blocks.5", 6, "tokens", True),
    "timm ViT, pooled": (
        lambda: timm.create_model("test_vit", global_pool="avg", class_token=True),
        "blocks.0",
        "blocks.5",
        6,
        "tokens",
        False,
    ),
    "timm ResNet": (lambda: timm.create_model("resnet18"), "layer1", "layer4", 4, "channels_first", False),
    "timm ConvNeXt": (lambda: timm.create_model("test_convnext"), "stages.0", "stages.3", 4, "channels_first", False),
    "torchvision ViT": (
        torchvision_vit,
        "encoder.layers.encoder_layer_0",
        "encoder.layers.encoder_layer_2",
        3,
        "tokens",
        True,
    ),
    "torchvision Swin": (torchvision_swin, "features.0", "features.3", 4, "channels_last", False),
    "norm layers": (lambda: make_net("bn"), "norm1", "norm2", 2, "channels_first", False),
    "parts of any net": (lambda: make_net("user"), "stem", "hidden", 2, None, False),
}
if importlib.util.find_spec("transformers"):
    small = {**VIT, "hidden_size": 16, "intermediate_size": 32}
    NETS["transformers ViT"] = (lambda: huggingface("ViT", **small), None, None, 3, "tokens", True)
    NETS["transformers BEiT"] = (lambda: huggingface("Beit", **small), None, None, 3, "tokens", False)
    dino = {**VIT, "hidden_size": 16}
    NETS["transformers DINOv2"] = (lambda: huggingface("Dinov2", **dino), None, None, 3, "tokens", False)
    swin = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 1, 1]}
    NETS["transformers Swin"] = (lambda: huggingface("Swin", **swin, window_size=4), None, None, 3, "tokens", False)


@pytest.mark.parametrize("name", NETS)
def test_blocks_of_known_nets(name):
    make, first, last, number, kind, first_only = NETS[name]
    torch.manual_seed(0)
    net = make().eval()
    for parameter in net.parameters():  # heads that begin at 0
        if not parameter.any():
            nn.init.normal_(parameter)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    blocks = find_blocks(net)
    assert len(blocks) == number
    assert first in (None, blocks[0].name)
    assert last in (None, blocks[-1].name)
    assert {block.kind for block in blocks} == {kind} or kind is None
    assert {block.first_only for block in blocks} == {first_only}
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())

    images = make_images(2, size=160 if name == "timm ViT" or name.endswith("pooled") else 32)
    images = images if first not in ("norm1", "stem") else make_images(2)
    seen = []
    with torch.no_grad():
        plain = net(images)
        with changed_blocks(net, blocks, lambda number, vectors: seen.append((number, vectors.shape))):
            same = net(images)
        with changed_blocks(net, blocks, lambda number, vectors: vectors):
            written = net(images)
        with changed_blocks(net, blocks, lambda number, vectors: vectors.flip(0) if number == 1 else None):
            changed = net(images)
    plain, same, written, changed = (getattr(output, "logits", output) for output in (plain, same, written, changed))
    assert torch.equal(same, plain)
    torch.testing.assert_close(written, plain)  # feature maps lie in memory in another order
    assert max_difference(changed, plain) > 1e-7
    assert [number for number, _ in seen] == list(range(len(blocks)))
    assert all(shape[1] == block.width for (_, shape), block in zip(seen, blocks, strict=True))
    assert not first_only or all(shape[0] == 2 for _, shape in seen)


@pytest.mark.parametrize("kind", ["vector", "tokens", "channels_first", "channels_last"])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, 7), lambda x: [x]])
def test_reading_and_writing(kind, wrap):
    shape = {"vector": (2, 3), "tokens": (2, 4, 3), "channels_first": (2, 3, 4, 5), "channels_last": (2, 4, 5, 3)}[kind]
    x = torch.randn(shape)
    block = Block("block", kind, 3)
    vectors = block.read(wrap(x))
    expected = x.permute(0, 2, 3, 1) if kind == "channels_first" else x
    assert torch.equal(vectors, expected.reshape(-1, 3))
    output = block.written(wrap(x), 2 * vectors)
    assert type(output) is type(wrap(x))
    assert torch.equal(output if isinstance(output, torch.Tensor) else output[0], 2 * x)
    if isinstance(output, tuple):
        assert output[1] == 7


def test_the_first_token():
    x = torch.randn(2, 4, 3)
    block = Block("block", "tokens", 3, True)
    assert torch.equal(block.read(x), x[:, 0])
    assert torch.equal(block.written(x, torch.zeros(2, 3)), torch.cat([torch.zeros(2, 1, 3), x[:, 1:]], 1))


def test_tokens_by_option():
    vit, pooled = timm.create_model("test_vit"), timm.create_model("test_vit", global_pool="avg")
    assert not any(block.first_only for block in find_blocks(vit, tokens="all"))
    assert all(block.first_only for block in find_blocks(vit, tokens="cls"))
    for net in (pooled, timm.create_model("resnet18")):
        with pytest.raises(UnsupportedModelError, match=r"no class token.*tokens='all'"):
            find_blocks(net, tokens="cls")


def test_named_blocks():
    net = timm.create_model("test_vit")
    names = ["blocks.3", "blocks.1.mlp"]
    assert [block.name for block in find_blocks(net, names)] == names[::-1]  # as they run
    for names, words in (
        (["blocks.3", "blocks.9"], "'blocks.9'.*does not run"),
        (["blocks.3", "blocks"], None),
        (["blocks.3"], "Two blocks or more.*has 1"),
        (["blocks.3", ""], "''.*returns no"),
    ):
        if words:
            with pytest.raises(UnsupportedModelError, match=words):
                find_blocks(net, names)


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)), "none"),
        (nn.Sequential(nn.Flatten(), nn.Linear(7, 5)), "takes none of the images alone"),
    ],
    ids=["no blocks", "no usual size"],
)
def test_refused_nets(net, words):
    with pytest.raises(UnsupportedModelError, match=f"{words}.*'t3a'"):
        find_blocks(net)
