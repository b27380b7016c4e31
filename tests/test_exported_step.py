"""Programs that go on adapting without torch: several batches equal the method's, with the state handed on."""

import json
from functools import partial

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import lightning_tta
from lightning_tta import Backbone, ConfigError, OnnxAdapter, UnsupportedModelError, adapt
from lightning_tta.cli.main import main
from lightning_tta.exported_step import ExportedStep, _cdist
from lightning_tta.methods import T3A
from lightning_tta.methods.components.refinements import affinity_matrix, refine
from nets import make_images, make_net, make_stream, max_difference
from test_export import Branch, predict, weights_file

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
SIZES = (4, 1, 9, 2)  # 9: more than there are classes


def stream():
    return [make_images(size, seed=50 + size) for size in SIZES]


CASES = {
    "t3a": {"filter_k": 2},
    "norm": {"momentum": 0.2, "source_weight": 0.3},
}


@pytest.mark.parametrize("name", CASES)
def test_onnx_adapts_as_the_method(tmp_path, name):
    method = adapt(Backbone(make_net("bn"), mean=[0.4] * 3, std=[0.3] * 3), name, **CASES[name])
    for images in make_stream(2):
        method(images)
    before = {key: value.clone() for key, value in {**method.adaptable, **method.rest}.items()}
    path = lightning_tta.save(method, tmp_path / "a.onnx", adapting=True, class_names=list("abcde"))
    assert all(torch.equal(value, {**method.adaptable, **method.rest}[key]) for key, value in before.items())
    adapter, first = OnnxAdapter(path), []
    said = adapter.session.get_modelmeta().custom_metadata_map
    assert (said["method"], said["adapting"], json.loads(said["class_names"])) == (name, "true", list("abcde"))
    for images in stream():
        logits = adapter(images.numpy())
        first.append(logits)
        assert logits.dtype == np.float32
        assert max_difference(torch.from_numpy(logits), method(images)) < 1e-4
        for key, value in adapter.state.items():
            assert max_difference(torch.from_numpy(value), method.value(key.removeprefix("state."))) < 1e-4
    assert adapter.state
    other = OnnxAdapter(path)
    other.state = dict(adapter.state)  # as from a file
    (images, *_) = stream()
    assert np.array_equal(adapter(images.numpy()), other(images.numpy()))
    adapter.reset()
    assert all(np.array_equal(adapter(images.numpy()), logits) for images, logits in zip(stream(), first, strict=True))
    assert not np.array_equal(OnnxAdapter(path)(stream()[1].numpy()), first[1])  # else nothing is handed on


def test_plain_onnxruntime(tmp_path):
    """The loop of the guide, which needs this package for the file alone; from the source by its initial state."""
    method = adapt(make_net("bn"), "norm", momentum=0.2)
    path = lightning_tta.save(method, tmp_path / "a.onnx", adapting=True, images=make_images(2))
    session, state = onnxruntime.InferenceSession(path), {}
    for images in stream():
        outputs = session.run(None, {"images": images.numpy(), **state})
        values = dict(zip([output.name for output in session.get_outputs()], outputs, strict=True))
        logits = values.pop("logits")
        state = {key.replace("next.", "state.", 1): value for key, value in values.items()}
        assert max_difference(torch.from_numpy(logits), method(images)) < 1e-4


def test_pt2(tmp_path):
    method = adapt(make_net("bn"), "t3a", filter_k=None)
    method(make_images(3))
    state = {name: value.clone() for name, value in method.adaptable.items()}
    program = torch.export.load(lightning_tta.save(method, tmp_path / "a.pt2", adapting=True)).module()
    for images in stream():
        logits, state = program(images, state)
        assert max_difference(logits, method(images)) < 1e-5
    assert max_difference(state["sums"], method.sums) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("affinity", ["knn", "rbf"])
def test_lame(tmp_path, affinity):
    """Its iterations are a loop of the program, with the same end."""
    method = adapt(make_net("bn"), "lame", affinity=affinity)
    method(make_images(3))
    adapter = OnnxAdapter(lightning_tta.save(method, tmp_path / "a.onnx", adapting=True))
    for images in stream():
        assert max_difference(torch.from_numpy(adapter(images.numpy())), method(images)) < 1e-4
    assert not adapter.state


class Refine(nn.Module):
    def forward(self, log_p, affinity):
        return refine(log_p, affinity)


def test_loop_ends_as_the_plain_one():
    for scale in (0.1, 3.0):  # few and many iterations
        log_p = (scale * torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()).log_softmax(1)
        weights = affinity_matrix(log_p, "rbf", 3)
        with torch.no_grad():
            found = torch.export.export(Refine(), (log_p, weights)).module()(log_p, weights)
        for value, expected in zip(found, refine(log_p, weights, known=lambda condition: bool(condition)), strict=True):
            assert torch.allclose(value, expected, rtol=1e-12)


def test_distances():
    points = torch.rand(7, 5, generator=torch.Generator().manual_seed(0)).double()
    assert torch.allclose(_cdist(points, points), torch.cdist(points, points), atol=1e-7)


def test_refusals(tmp_path):
    method = adapt(make_net("bn"), "tent", lr=0.01)
    method(make_images(4))
    with pytest.raises(UnsupportedModelError, match=r"'tent' learns by gradients.*plain net.*'t3a', 'lame', 'norm'"):
        lightning_tta.save(method, tmp_path / "a.onnx", adapting=True)
    method = adapt(make_net("bn"), "t3a")
    with pytest.raises(ConfigError, match=r"Give an example"):
        lightning_tta.save(method, tmp_path / "a.onnx", adapting=True)
    with pytest.raises(ConfigError, match=r"writes a program, a\.onnx or a\.pt2; 'safetensors' holds"):
        lightning_tta.save(method, tmp_path / "a.safetensors", adapting=True)
    method = adapt(Branch(), "source")
    method(make_images(4))
    with pytest.raises(UnsupportedModelError, match=r"Branch cannot be written as pt2"):
        lightning_tta.save(method, tmp_path / "a.pt2", adapting=True)
    method = adapt(make_net("bn"), "norm", momentum=0.1)
    method.step = lambda x: method.logits(x) if x.shape[0] < 9 else 2 * method.logits(x)
    with pytest.raises(UnsupportedModelError, match="branches on the number of images"):
        ExportedStep(method, make_images(2)).export(make_images(2))
    for added in ({"statistics": "ema"}, {"prior": "em"}):
        method = adapt(make_net("bn"), "source", **added)
        method(make_images(4))
        with pytest.raises(UnsupportedModelError, match=f"without {next(iter(added))}=.* Leave that out"):
            lightning_tta.save(method, tmp_path / "a.onnx", adapting=True)
    assert not list(tmp_path.iterdir())


def test_a_program_that_adapts_otherwise(tmp_path):
    """What a step keeps beside its declared state is not in the program: found by running it."""
    method = adapt(make_net("bn"), "source")
    method(make_images(4))
    plain, seen = method.step, []
    method.step = lambda x: (seen.append(1), plain(x) * len(seen))[1]
    with pytest.raises(UnsupportedModelError, match=r"does not adapt as the method does: logits after .* images"):
        lightning_tta.save(method, tmp_path / "a.pt2", adapting=True)


@pytest.mark.slow
def test_command(tmp_path, capsys):
    weights = {"source_ckpt": weights_file(tmp_path), "backbone": "timm/test_resnet", "num_classes": 10}
    module = predict(tmp_path / "run", partial(T3A, filter_k=3), **weights)
    main(["export", str(tmp_path / "run"), f"--output={tmp_path / 'a.onnx'}", "--adapting=true"])
    adapter, method = OnnxAdapter(tmp_path / "a.onnx"), module.method
    assert set(adapter.state) == set()
    for seed in range(2):
        images = torch.rand(3, *method.image_shape, generator=torch.Generator().manual_seed(seed))
        assert max_difference(torch.from_numpy(adapter(images.numpy())), method(images)) < 1e-4
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "run"), f"--output={tmp_path / 'a.pt'}", "--adapting=true"])
    assert "adapting=True writes a program" in capsys.readouterr().err
