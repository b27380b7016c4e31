"""Every method on a GPU that is none: all tensors on one device, and nothing that a graph of a step cannot hold."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from contract import FIRST, SUPPORTED, build, case_id
from fake_gpu import DEVICE, NotOnTheDevice, OnTheDevice, fake_gpu, move
from nets import make_images

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
]

OTHERS = (
    "memo",
    "zero",
    "view_averaging",
    "single_image_bn",
    "meta_ttt",
)  # that do not yet say which parts are tensors
CASES = [case for case in SUPPORTED if case[2] != "user"]


def parts_of(method, images):
    """What a step on real images replays: names of functions, and the shapes and dtypes of their tensors."""
    parts = []

    def record(name, function, *tensors):
        result = function(*tensors)
        parts.append((function.__name__, [(t.shape, t.dtype) for t in tensors]))
        return result

    method.replayed = record
    method(images)
    del method.replayed
    return list({str(part): part for part in parts}.values())


def on_the_device(method, function, shapes):
    """Call a function of a method, moved to the device, with tensors there; nothing may happen elsewhere."""
    tensors = [torch.rand(shape, device=DEVICE).to(dtype) for shape, dtype in shapes]
    method._batch_size, method._counts, method._notes = 4, {}, {}
    with method.hold(), torch.enable_grad(), method.running(), OnTheDevice():
        method._unrecorded = tensors[0] if method._account is not None else None
        return getattr(method, function)(*tensors)


@pytest.mark.parametrize(
    ("case", "has_run"),
    [(case, has_run) for case in CASES for has_run in (False, True) if not has_run or case in FIRST],
    ids=lambda value: case_id(*value) if isinstance(value, tuple) else ("moved in mid-stream" if value else "new"),
)
def test_a_step_stays_on_the_device(case, has_run):
    images = make_images(4)
    parts = [("step", [(images.shape, images.dtype)])]
    method = build(*case)
    if method.step_on_host:
        parts = parts_of(build(*case), images)
        assert parts, "it says that its step needs the host, and replays no part of it"
    elif method.name in OTHERS:
        pytest.skip("asks the host, and does not say so yet")
    if has_run:
        method(images)
    with fake_gpu():
        move(method)
        for function, shapes in parts:
            result = on_the_device(method, function, shapes)
            assert result.device.type == DEVICE
            for value in (*method._notes.values(), *method._counts.values()):
                assert not isinstance(value, torch.Tensor) or value.device.type == DEVICE
        for tensor in (*method.parameters(), *method.buffers(), *method._rest.values(), *method._sources.values()):
            assert tensor.device.type == DEVICE


@pytest.mark.parametrize("case", [case for case in CASES if case[0] in ("eata", "cotta") and case[2] == "bn"], ids=str)
def test_source_data_on_the_device(case, monkeypatch):
    """prepare() may ask the host: it is no step."""
    method = build(*case, prepare=False)
    with fake_gpu():
        move(method)
        monkeypatch.setattr(method.task, "usable", lambda x: torch.ones(len(x), dtype=torch.bool))
        monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: True)
        method._first_pass.has_run = True  # the first look at a net asks for its values
        method.prepare([{"image": torch.rand(4, 3, 16, 16)}])
        assert all(tensor.device.type == DEVICE for tensor in method.buffers())


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (lambda x: x + torch.ones(3, 16, 16), (NotOnTheDevice, RuntimeError)),
        (lambda x: x * torch.tensor(5.0, device=x.device), NotOnTheDevice),
        (lambda x: x - x.new_tensor([[[0.5]]]), NotOnTheDevice),
        (lambda x: x.cpu(), NotOnTheDevice),
        (lambda x: x if x.sum() > 0 else -x, DataDependentOutputException),
        (lambda x: x * x.mean().item(), DataDependentOutputException),
        (lambda x: x[x.mean((1, 2, 3)) > 0], Exception),
    ],
)
def test_faults_are_found(fault, error, monkeypatch):
    method = build("tent", {}, "bn")
    plain = type(method).step
    monkeypatch.setattr(type(method), "step", lambda self, x: plain(self, fault(x)))
    with fake_gpu():
        move(method)
        with pytest.raises(error):
            on_the_device(method, "step", [((4, 3, 16, 16), torch.float32)])


def test_the_device_is_not_left_behind():
    method = build("tent", {}, "bn")
    with fake_gpu():
        move(method)
    weight = torch.ones(2, requires_grad=True)
    assert torch.autograd.grad(weight.sum(), weight)[0].device.type == "cpu"
