import hashlib
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_tta.backbones import Backbone, create_backbone, load_weights, state_digest
from lightning_tta.backbones.cifar import WideResNet
from lightning_tta.backbones.weights import CodeInFileError, read_state_dict
from lightning_tta.errors import WeightsError


def small_net(seed: int = 0, classes: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, classes))
    for value in net.state_dict().values():
        value.copy_(torch.rand(value.shape) * 9)
    return net


def small_backbone(seed: int = 0) -> Backbone:
    return Backbone(small_net(seed), (0.5,), (0.25,))


def renamed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture
def source() -> dict[str, Tensor]:
    return small_net(seed=1).state_dict()


# Reading files


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "net", "ema", "anything"])
def test_containers_are_unwrapped(tmp_path: Path, source: dict[str, Tensor], key: str) -> None:
    file = tmp_path / "c.pth"
    torch.save({key: source, "epoch": 3, "optimizer": {"state": {0: {"step": 1}}, "param_groups": []}}, file)
    assert_same(read_state_dict(file), source)


@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt", "safetensors"])
def test_every_format_is_read(tmp_path: Path, source: dict[str, Tensor], suffix: str) -> None:
    file = tmp_path / f"w.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(source, file)
    assert_same(read_state_dict(str(file)), source)


def test_several_sets_are_named_and_plain_weights_are_taken(tmp_path: Path, source: dict[str, Tensor]) -> None:
    torch.save({"ema": small_net(2).state_dict(), "state_dict": source}, tmp_path / "c.pt")
    with pytest.warns(UserWarning, match=r"'state_dict' is read, not \['ema'\]"):
        assert_same(read_state_dict(tmp_path / "c.pt"), source)


def test_entries_that_are_not_tensors_are_named(tmp_path: Path, source: dict[str, Tensor]) -> None:
    torch.save({**source, "epoch": 3}, tmp_path / "c.pt")
    with pytest.warns(UserWarning, match="not tensors, left out: epoch"):
        assert_same(read_state_dict(tmp_path / "c.pt"), source)


class Unsafe:
    """Something that only running code can restore."""


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def make_truncated_zip(path: Path) -> None:
    torch.save(small_net().state_dict(), path)
    cut(path)


def make_truncated_safetensors(path: Path) -> None:
    save_file(small_net().state_dict(), path)
    cut(path)


@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        ("gone.pt", lambda p: None, r"does not exist \(its folder exists\)"),
        ("no/where.pt", lambda p: None, "nor does its folder"),
        ("folder.pt", lambda p: (p.mkdir(), (p / "a.ckpt").touch()), r"is a directory.*a\.ckpt"),
        ("empty.pt", lambda p: p.touch(), "is empty"),
        ("text.pt", lambda p: p.write_text("hello world\n" * 20), "not a readable checkpoint"),
        ("text.safetensors", lambda p: p.write_text("hello world\n" * 20), "not a readable checkpoint"),
        ("cut.pt", make_truncated_zip, "cut short"),
        ("cut.safetensors", make_truncated_safetensors, "cut short"),
        ("code.pt", lambda p: torch.save({"model": Unsafe()}, p), r"Unsafe\), which is refused.*save its state dict"),
        ("numpy.pt", lambda p: torch.save({"net": {}, "acc": np.float64(1)}, p), "which is refused"),
        ("list.pt", lambda p: torch.save([1, 2], p), "holds a list"),
        ("rest.pt", lambda p: torch.save({"epoch": 3, "lr": 0.1}, p), "no state dict.*epoch, lr"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, make: Callable[[Path], Any], says: str) -> None:
    path = tmp_path / name
    make(path)
    with pytest.raises(WeightsError, match=f"(?s)^(W|{tmp_path}).*{says}") as caught:
        read_state_dict(path)
    assert isinstance(caught.value, CodeInFileError) == ("refused" in says)
    assert str(path) in str(caught.value)


# Fitting names


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "model.",
        "net.",
        "backbone.",
        "backbone.net.",
        "module.model._orig_mod.",
        "_orig_mod.module.",
        "1.",
    ],
)
@pytest.mark.parametrize("make", [small_net, small_backbone])
def test_prefixes_are_found(
    tmp_path: Path, source: dict[str, Tensor], prefix: str, make: Callable[[], nn.Module]
) -> None:
    torch.save(renamed(source, prefix), tmp_path / "w.pt")
    net = make()
    load_weights(net, tmp_path / "w.pt")
    assert_same((net.net if isinstance(net, Backbone) else net).state_dict(), source)


def test_a_backbones_own_state_dict_is_read_back(tmp_path: Path) -> None:
    original, other = small_backbone(seed=1), small_backbone(seed=2)
    torch.save(original.state_dict(), tmp_path / "own.pt")
    load_weights(other, tmp_path / "own.pt")
    assert state_digest(other) == state_digest(original)
    assert other.info["weights"] == "own.pt"


def test_other_parts_of_a_lightning_checkpoint_are_named(tmp_path: Path, source: dict[str, Tensor]) -> None:
    state = {**renamed(source, "backbone.net."), "val_acc.correct": torch.tensor(3)}
    torch.save({"state_dict": state, "epoch": 1, "hyper_parameters": {"lr": 0.1}}, tmp_path / "w.ckpt")
    net = small_net()
    with pytest.warns(UserWarning, match=r"1 entries of .* not under 'backbone\.net\.'.*: val_acc\.correct"):
        load_weights(net, tmp_path / "w.ckpt")
    assert_same(net.state_dict(), source)


def test_two_different_copies_need_a_choice(tmp_path: Path, source: dict[str, Tensor]) -> None:
    teacher = small_net(seed=5).state_dict()
    torch.save({**renamed(source, "student."), **renamed(teacher, "teacher.")}, tmp_path / "w.pt")
    net = small_net()
    with pytest.raises(WeightsError, match=r"more than once.*student\..*teacher\."):
        load_weights(net, tmp_path / "w.pt")
    with pytest.warns(UserWarning, match="left out: student"):
        load_weights(net, tmp_path / "w.pt", prefix="teacher.")
    assert_same(net.state_dict(), teacher)


def test_mismatches_are_listed_and_nothing_is_changed(tmp_path: Path, source: dict[str, Tensor]) -> None:
    state = dict(source)
    state["0.extra"] = state.pop("0.weight")
    state["1.weight"] = torch.ones(7)
    torch.save(renamed(state, "module."), tmp_path / "w.pt")
    net = small_net()
    before = state_digest(net)
    with pytest.raises(WeightsError) as caught:
        load_weights(net, tmp_path / "w.pt")
    message = str(caught.value)
    assert str(tmp_path / "w.pt") in message
    assert "prefix 'module.' stripped" in message
    assert "missing (1): 0.weight" in message
    assert "unexpected (1): 0.extra" in message
    assert "wrong shape (1): 1.weight (checkpoint (7,), net (4,))" in message
    assert state_digest(net) == before


def test_long_lists_are_cut_after_ten_with_the_count(tmp_path: Path, source: dict[str, Tensor]) -> None:
    torch.save({**source, **{f"more.{i:02}": torch.ones(5) for i in range(13)}}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"unexpected \(13\): more\.00.*more\.09, \.\.\. and 3 more"):
        load_weights(small_net(), tmp_path / "w.pt")


def test_another_number_of_classes_gets_a_hint_and_strict_false_loads_the_rest(
    tmp_path: Path, source: dict[str, Tensor]
) -> None:
    torch.save(source, tmp_path / "w.pt")
    net = small_net(classes=5)
    head = {name: net.state_dict()[name].clone() for name in ("3.weight", "3.bias")}
    with pytest.raises(WeightsError, match=r"'3' has 3 rows in the checkpoint and 5 in the net.*num_classes=3"):
        load_weights(net, tmp_path / "w.pt")
    with pytest.warns(UserWarning, match=r"7 entries loaded:\n  wrong shape \(2\): 3\.weight"):
        load_weights(net, tmp_path / "w.pt", strict=False)
    assert_same(net.state_dict(), {**source, **head})


def test_weights_of_another_net_are_refused_even_when_not_strict(tmp_path: Path) -> None:
    torch.save({"a.kernel": torch.ones(3)}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"missing \(8\).*\n.*unexpected \(1\): a\.kernel"):
        load_weights(small_net(), tmp_path / "w.pt", strict=False)


def test_old_checkpoints_without_batch_counts_load(tmp_path: Path, source: dict[str, Tensor]) -> None:
    del source["1.num_batches_tracked"]
    torch.save(source, tmp_path / "w.pt")
    net = small_net()
    count = net.state_dict()["1.num_batches_tracked"].clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_weights(net, tmp_path / "w.pt")
    assert_same(net.state_dict(), {**source, "1.num_batches_tracked": count})


# Normalisation beside the weights


def normalised(source: dict[str, Tensor], kind: str, mean: float, std: float) -> dict[str, Tensor]:
    mu, sigma = torch.full((1, 3, 1, 1), mean), torch.full((1, 3, 1, 1), std)
    if kind == "buffers":
        return {**source, "mu": mu, "sigma": sigma}
    return {"normalize.mean": mu, "normalize.std": sigma, **renamed(source, "model.")}


@pytest.mark.parametrize("kind", ["buffers", "layer"])
def test_carried_normalisation_must_be_the_backbones(tmp_path: Path, source: dict[str, Tensor], kind: str) -> None:
    torch.save(normalised(source, kind, 0.5, 0.25), tmp_path / "same.pt")
    torch.save(normalised(source, kind, 0.5, 0.5), tmp_path / "other.pt")
    backbone = small_backbone()
    before = state_digest(backbone)
    with pytest.raises(WeightsError, match=r"carries its own normalisation.*0\.5, 0\.5, 0\.5.*\[0\.25, 0\.25, 0\.25\]"):
        load_weights(backbone, tmp_path / "other.pt")
    assert state_digest(backbone) == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_weights(backbone, tmp_path / "same.pt")
    assert_same(backbone.net.state_dict(), source)
    with pytest.warns(UserWarning, match="Sequential does not apply"):
        load_weights(small_net(), tmp_path / "same.pt")


def test_create_backbone_takes_the_normalisation_the_file_carries(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = WideResNet(40, 2).state_dict()
    torch.save({"state_dict": normalised(renamed(state, "module."), "buffers", 0.4, 0.3)}, tmp_path / "w.pt")
    backbone = create_backbone("cifar/wrn_40_2", weights=tmp_path / "w.pt")
    assert backbone.preprocessing["mean"] == pytest.approx([0.4] * 3)
    assert backbone.preprocessing["std"] == pytest.approx([0.3] * 3)
    assert_same(backbone.net.state_dict(), state)
    with pytest.warns(UserWarning, match=r"mean=\[0\.1\] differs from the mean \[0\.4"):
        given = create_backbone("cifar/wrn_40_2", weights=tmp_path / "w.pt", mean=[0.1], std=[0.3])
    assert given.preprocessing["mean"] == [0.1, 0.1, 0.1]


# Digest


def test_digest_survives_save_load_and_memory_layout(tmp_path: Path) -> None:
    net = small_net()
    digest = state_digest(net)
    assert len(digest) == 16
    assert int(digest, 16) >= 0
    torch.save(net.state_dict(), tmp_path / "w.pt")
    other = small_net(seed=9)
    assert state_digest(other) != digest
    load_weights(other, tmp_path / "w.pt")
    assert state_digest(other) == digest
    assert state_digest(other.to(memory_format=torch.channels_last)) == digest


@pytest.mark.parametrize("name", [f"{n}" for n in small_net().state_dict()])
def test_digest_sees_one_value_of_any_entry(name: str) -> None:
    net = small_net()
    before = state_digest(net)
    value = net.state_dict()[name]
    flat = value.view(-1)
    flat[-1] = torch.nextafter(flat[-1], flat[-1] + 1) if value.is_floating_point() else flat[-1] + 1
    assert state_digest(net) != before


def test_digest_sees_dtype_shape_and_names() -> None:
    zeros = [nn.Linear(2, 6), nn.Linear(3, 4), nn.Linear(2, 6, dtype=torch.float16), nn.Sequential(nn.Linear(2, 6))]
    for net in zeros:
        for value in net.state_dict().values():
            value.zero_()
    assert len({state_digest(net) for net in zeros}) == len(zeros)
    assert state_digest(nn.Linear(2, 2, dtype=torch.bfloat16))


def test_the_digest_in_a_files_name_is_compared(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "w.safetensors")
    content = (tmp_path / "w.safetensors").read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:8]
    for name, damaged in (
        (f"w-{digest}.safetensors", False),
        ("w-deadbeef.safetensors", True),
        ("w-20240131.safetensors", False),
    ):
        (tmp_path / name).write_bytes(content)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read_state_dict(tmp_path / name)
        assert [digest in str(warning.message) for warning in caught] == [True] * damaged


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path, source: dict[str, Tensor]) -> None:
    plain, bomb = tmp_path / "plain.pt", tmp_path / "bomb.pt"
    torch.save({"weight": torch.zeros(2**22)}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    assert read_state_dict(plain)["weight"].shape == (2**22,)
    assert bomb.stat().st_size < 2**16
    with pytest.raises(WeightsError, match=r"bomb.pt has .* bytes and would unpack to 16,7"):
        read_state_dict(bomb)
