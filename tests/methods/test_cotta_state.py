"""CoTTA: what its random draws, chunks, copies and saves depend on."""

import copy

import pytest
import torch
from test_cotta import TOLERANCE

from lightning_tta import ConfigError, adapt
from lightning_tta.methods.components import teacher
from nets import KINDS, make_images, make_net, make_stream, max_difference, same, without_running_statistics
from plain import assert_goes_on_after_loading

pytestmark = pytest.mark.usefixtures("one_thread")


def test_masks_and_views_come_from_the_seed():
    stream = make_stream(3)
    runs = []
    for seed in (0, 0, 1):
        method = adapt(make_net("gn"), "cotta", lr=1e-2, views=2, restore=0.3, seed=seed)
        runs.append(([method(images) for images in stream], copy.deepcopy(method.model.state_dict())))
    assert same(runs[0], runs[1])
    assert not torch.equal(runs[0][0][0], runs[2][0][0])  # views
    source = dict(make_net("gn").named_parameters())
    kept = [torch.cat([(state[n] == source[n]).flatten() for n in source]) for _, state in runs]
    assert (kept[0] != kept[2]).double().mean() > 0.2  # masks


def test_every_step_and_view_has_a_draw_of_its_own(monkeypatch):
    seeds = []
    monkeypatch.setattr(teacher, "jitter", lambda images, key: seeds.append(tuple(key.tolist())) or images)
    monkeypatch.setattr(teacher, "restore_some", lambda *args: seeds.append(tuple(args[3].tolist())))
    method, images = adapt(make_net("gn"), "cotta", views=3, anchor_threshold=1.0, steps=2), make_images(2)
    for _ in range(3):
        method(images)
    assert len(seeds) == len(set(seeds)) == 3 * 2 * (3 + 1)
    first, seeds[:] = list(seeds), []
    method.reset()
    for _ in range(3):
        method(images)
    assert seeds == first


def test_all_weights_at_once_are_restored_as_one_by_one(monkeypatch):
    """In a few kernels where kernels are dear: by products, not by choices; the draw is the same."""
    shapes, key = [(3, 5), (7,), (2, 2, 2), (1,), (1001,)], torch.tensor([3, 9])
    source = {str(n): torch.randn(shape) for n, shape in enumerate(shapes)}
    start = {name: torch.randn_like(value) for name, value in source.items()}
    results = []
    for portions in (teacher._portions, lambda tensors: [tensors[:2], tensors[2:]], lambda tensors: [tensors]):
        monkeypatch.setattr(teacher, "_portions", portions)
        weights = {name: value.clone() for name, value in start.items()}
        teacher.restore_some(weights, source, 0.3, key, torch.tensor(False))
        assert same(weights, start)
        teacher.restore_some(weights, source, 0.3, key, torch.tensor(True))
        results.append(weights)
        assert all(bool(((weights[n] == source[n]) | (weights[n] == start[n])).all()) for n in source)
    assert same(results[0], results[1])
    assert same(results[0], results[2])
    share = (results[0]["4"] == source["4"]).double().mean()
    assert abs(share - 0.3) < 0.08
    assert not torch.equal(
        results[0]["4"][:500] == source["4"][:500], results[0]["4"][500:1000] == source["4"][500:1000]
    )


@pytest.mark.parametrize("probability", [1e-12, 1.0])
def test_restore_at_the_ends(probability):
    weights, source = {"w": torch.ones(10_000)}, {"w": torch.zeros(10_000)}
    teacher.restore_some(weights, source, probability, torch.tensor([0, 1]))
    assert weights["w"].sum() == (0 if probability == 1 else 10_000)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_masked_update_of_the_teacher(dtype):
    student = {"a.w": torch.randn(50).to(dtype), "b": torch.randn(3, 4).to(dtype)}
    target = {name: value + torch.ones_like(value) for name, value in student.items()}
    means = [teacher.Teacher(student) for _ in range(3)]
    for mean, where in zip(means, (None, torch.tensor(True), torch.tensor(False)), strict=True):
        mean.update(target, 0.9, where)
    for name, value in student.items():
        start = value.double()
        expected = 0.9 * start + 0.1 * target[name].double()
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        for mean, goal in zip(means, (expected, expected, start), strict=True):
            assert (mean.weights()[name].double() - goal).abs().max() < tolerance


@pytest.mark.parametrize(
    ("options", "forwards"),
    [
        ({"anchor_threshold": 0.0}, 2),  # teacher, student
        ({"anchor_threshold": 1e-6}, 3),  # and anchor
        ({"views": 7, "chunk_views": None}, 4),  # anchor, teacher for the account of the stream, its views, student
        ({"views": 7, "chunk_views": 28}, 4),
        ({"views": 7, "chunk_views": 27}, 5),  # 6 + 1 views of 4 images
        ({"views": 7, "chunk_views": 11}, 7),
        ({"views": 7, "chunk_views": 1}, 10),
        ({}, 4),  # 32 x 4 images fit into one pass
    ],
    ids=str,
)
def test_passes(options, forwards):
    method = adapt(make_net("bn"), "cotta", **{"anchor_threshold": 1.0, **options})
    sizes = []
    method.model.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    for images in make_stream(2):
        sizes.clear()
        method(images)
        assert (method.stats["forwards"], method.stats["backwards"]) == (forwards, 1)
        assert len(sizes) == forwards
        assert max(sizes) <= max(4, options.get("chunk_views", 512) or 28)
        assert sum(sizes) == 4 * (forwards if method.anchor_threshold < 1 else 3 + method.views)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_nothing(kind):
    images, results = make_images(5, dtype=torch.float64), []
    for chunk in (None, 1, 10, 12):
        method = adapt(make_net(kind).double(), "cotta", lr=1e-2, anchor_threshold=1.0, views=4, chunk_views=chunk)
        results.append([method(images), method(images)])
    for other in results[1:]:
        assert all(max_difference(a, b) < TOLERANCE for a, b in zip(results[0], other, strict=True))


def test_the_anchor_stays_the_source():
    net = make_net("bn").double()
    anchor = without_running_statistics(copy.deepcopy(net))
    method = adapt(net, "cotta", lr=0.1, ema_decay=0.5, views=2, restore=0.0)
    for images in make_stream(4, batch=6, dtype=torch.float64):
        method(images)
        with torch.no_grad():
            assert abs(method.stats["anchor_confidence"] - anchor(images).softmax(1).amax(1).mean().item()) < TOLERANCE


def test_one_copy_of_the_source():
    method = adapt(make_net("bn"), "cotta")
    for _ in range(2):
        state = {name: method.source_value(name) for name in method.adaptable}
        assert len(state) == 2 * len(list(method.model.parameters()))
        pointers = {value.data_ptr() for value in state.values()}
        assert len(pointers) == len(state) // 2  # student, teacher and anchor share it
        method.double()


@pytest.mark.parametrize("restore", [0.0, 0.3])
def test_save_and_reset_in_mid_stream(restore):
    options = {"lr": 1e-2, "ema_decay": 0.7, "views": 3, "restore": restore}
    method, other = (adapt(make_net("bn", seed=seed), "cotta", **options) for seed in (0, 5))
    assert_goes_on_after_loading(method, other, make_stream(5))


def test_a_half_precision_teacher_moves():
    net = make_net("gn").bfloat16()
    method = adapt(net, "cotta", lr=1e-2, views=1)
    start = {n: w.clone() for n, w in method.teacher.weights().items()}
    for images in make_stream(3):
        method(images)
    for name, weight in method.teacher.weights().items():
        assert weight.dtype == torch.float32
        assert not torch.equal(weight, start[name])


@pytest.mark.parametrize(
    "options",
    [
        {"anchor_threshold": 1.1},
        {"anchor_threshold": -0.1},
        {"ema_decay": 1.5},
        {"restore": -0.1},
        {"views": 0},
        {"chunk_views": 0},
        {"seed": -1},
    ],
    ids=str,
)
def test_wrong_options(options):
    with pytest.raises(ConfigError, match=r"must be .*; got"):
        adapt(make_net("bn"), "cotta", **options)
