"""Every method on a GPU that is none: all tensors on one device, and nothing that a graph of a step cannot hold."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._pytree import tree_leaves

from contract import FIRST, SUPPORTED, VARIANTS, build, case_id, spread
from fake_gpu import DEVICE, KernelCount, NotOnTheDevice, OnTheDevice, fake_gpu, move
from nets import make_images

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
]

CASES = spread([case for case in SUPPORTED if case[2] != "user"], 2)


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
    method._batch_size, method.scalars = 4, ({}, {})
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
    if has_run:
        method(images)
    with fake_gpu():
        move(method)
        for function, shapes in parts:
            for result in tree_leaves(on_the_device(method, function, shapes)):
                assert result.device.type == DEVICE
            for value in (*method.scalars[0].values(), *method.scalars[1].values()):
                assert not isinstance(value, torch.Tensor) or value.device.type == DEVICE
        for tensor in (*method.parameters(), *method.buffers(), *method._rest.values(), *method._sources.values()):
            assert tensor.device.type == DEVICE


@pytest.mark.parametrize(
    "case", [case for case in CASES if case[0] in ("eata", "cotta", "neo", "output_shift") and case[2] == "bn"], ids=str
)
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


class Deep(torch.nn.Module):
    """As many blocks of a convolution and BatchNorm as wanted."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        layers = [
            (torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.BatchNorm2d(3), torch.nn.ReLU()) for _ in range(blocks)
        ]
        self.blocks = torch.nn.Sequential(*(torch.nn.Sequential(*block) for block in layers))
        self.head = torch.nn.Linear(3, 5)

    def forward(self, x):
        return self.head(self.blocks(x).mean((2, 3)))


def kernels(name, options, blocks, function="step"):
    """Kernels of one step on a net of so many blocks."""
    method = build(name, options, "bn", net=Deep(blocks).eval())
    shapes = [((4, 3, 16, 16), torch.float32)]
    with fake_gpu(), KernelCount() as count:
        move(method)
        on_the_device(method, function, shapes)
        before = count.total
        on_the_device(method, function, shapes)
        return count.total - before


@pytest.fixture(scope="module")
def of_tent():
    """Kernels of a pass and of a step of Tent, forward and backward, for a block."""
    return [(kernels(name, {}, 24) - kernels(name, {}, 8)) / 16 for name in ("source", "tent")]


PASSES = {  # forward passes alone, and passes with a backward pass, of each method; kernels a block on top
    ("norm", 0): (1, 0, 0),
    ("norm", 2): (1, 0, 3),  # moments, average, and their mixture with the source in each layer
    ("t3a", 0): (1, 0, 0),
    ("lame", 0): (1, 0, 0),
    ("neo", 3): (1, 0, 0),
    ("output_shift", 0): (1, 0, 0),
    ("come", 0): (0, 1, 0),
    ("ostta", 0): (1, 1, 0),
    ("eta", 0): (0, 1, 0),
    ("eata", 0): (0, 1, 0),
    ("sar", 2): (1, 2, 0),  # with the source filter
    ("deyo", 0): (1, 1, 19),  # statistics of some of the batch, in each layer
    ("zerosiam", 0): (0, 1, 0),
}


@pytest.mark.parametrize("case", PASSES, ids=str)
def test_kernels_do_not_grow_with_the_number_of_parameters(case, of_tent):
    """A loop over parameters would show: what is not a pass takes a few kernels for all of them."""
    (name, number), (forward, both, more) = case, PASSES[case]
    options = {**VARIANTS[name][number], "steps": 1} if "steps" in VARIANTS[name][number] else VARIANTS[name][number]
    growth = (kernels(name, options, 24) - kernels(name, options, 8)) / 16
    assert growth <= forward * of_tent[0] + both * of_tent[1] + more + 0.2


def test_kernels_of_cotta_do_not_grow_either(of_tent):
    options = {**VARIANTS["cotta"][0], "restore": 0.1}
    growth = (kernels("cotta", options, 24, "_sure_step") - kernels("cotta", options, 8, "_sure_step")) / 16
    assert growth <= of_tent[0] + of_tent[1] + 0.2
