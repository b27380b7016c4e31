"""``gate=``: no update while the stream looks like the source."""

import copy
import io

import pytest
import torch

from lightning_tta import ConfigError, DataError, NotPreparedError, adapt
from lightning_tta.evidence.betting import ShiftTest
from lightning_tta.losses import entropy
from nets import make_images, make_net

BATCH, PATIENCE = 20, 60


def shifted(number):
    """Red images: entropies of the small nets are others."""
    return make_images(BATCH, seed=number) * torch.tensor([1, 0.1, 0.1])[:, None, None]


@pytest.fixture(scope="module", params=["bn", "gn"])
def net(request):
    return make_net(request.param)


@pytest.fixture(scope="module")
def source():
    return [{"image": make_images(50, seed=500 + number)} for number in range(6)]


def gated(net, source, method="tent", **options):
    options = {"lr": 0.02, "gate": {"kind": "poem", "patience": PATIENCE}, **options}
    made = adapt(net, method, **options)
    made.prepare(source)
    return made


@torch.no_grad()
def plain(net, images):
    return net(images)


def stream():
    """Six batches like the source, ten that are shifted, eight like the source."""
    clean = [make_images(BATCH, seed=number) for number in range(14)]
    return [*clean[:6], *(shifted(100 + number) for number in range(10)), *clean[6:]]


def by_hand(net, source):
    """Whether the gate is open for each batch, and whether it closes with it: the docstring's rules."""
    test = ShiftTest(torch.cat([entropy(plain(net, batch["image"]).double()) for batch in source]))
    is_open, since, flags = False, 0, []
    for images in stream():
        test.see(entropy(plain(net, images).double()))
        since += BATCH
        if test.alarmed:
            is_open, since = True, 0
            test.restart()
        elif is_open and since >= PATIENCE:
            is_open, since = False, 0
            test.restart()
        flags.append(is_open)
    return flags


def test_it_opens_adapts_and_closes_as_its_rules_say(net, source):
    """Closed: the source's answers and one pass. Open: those of a method that starts there, and one pass more."""
    flags = by_hand(net, source)
    assert flags[0] is False
    assert True in flags
    assert flags[-1] is False  # the three parts are there
    method, alone = gated(net, source), None
    start = {name: tensor.clone() for name, tensor in method.adaptable.items()}
    for images, is_open in zip(stream(), flags, strict=True):
        logits, stats = method(images), method.stats
        assert stats["gate_open"] == is_open
        if is_open:
            alone = alone or adapt(net, "tent", lr=0.02)
            torch.testing.assert_close(logits, alone(images), rtol=0, atol=0)
            assert (stats["forwards"], stats["backwards"]) == (2, 1)
            assert any(not torch.equal(start[name], tensor) for name, tensor in method.adaptable.items())
        else:
            alone = None
            torch.testing.assert_close(logits, plain(net, images), rtol=0, atol=0)
            assert (stats["forwards"], stats["backwards"]) == (1, 0)
            assert all(torch.equal(start[name], tensor) for name, tensor in method.adaptable.items())
            torch.testing.assert_close(method.predict(images), logits, rtol=0, atol=0)
            torch.testing.assert_close(plain(method.export(), images), logits, rtol=0, atol=1e-6)


def test_saved_copied_and_reset_it_goes_on_bit_by_bit(net, source):
    """From every batch on, so in all of its states; half way through a test, too."""
    method, batches = gated(net, source, "eata", fisher_alpha=0.0, entropy_margin=0.9), stream()
    expected, moments = [], {}
    for number, images in enumerate(batches):
        if number in (3, 7, 12, 18):
            file = io.BytesIO()
            torch.save(method.state_dict(), file)
            moments[number] = file
        expected.append(method(images))
    for number, file in moments.items():
        file.seek(0)
        again = adapt(net, "eata", lr=0.02, fisher_alpha=0.0, entropy_margin=0.9, gate={"kind": "poem", "patience": 60})
        again.load_state_dict(torch.load(file))
        again = copy.deepcopy(again)
        for images, logits in zip(batches[number:], expected[number:], strict=True):
            assert torch.equal(again(images), logits)
    method.reset()
    for images, logits in zip(batches[:9], expected[:9], strict=True):
        assert torch.equal(method(images), logits)


def test_its_knowledge_outlives_a_reset_that_the_method_gives_itself(net, source):
    method = gated(net, source)
    for images in stream()[:3]:
        method(images)
    wealth = method.stats["gate_log_wealth"]
    with method.hold():
        method.reset_where(torch.tensor(True))
    method.predict(stream()[3])
    twin = gated(net, source)
    for images in stream()[:3]:
        twin(images)
    method(stream()[3])
    twin(stream()[3])
    assert method.stats["gate_log_wealth"] == twin.stats["gate_log_wealth"] != wealth


def test_images_left_out_do_not_count(source):
    net = make_net("gn")
    method, twin = gated(net, source), gated(net, source)
    images = make_images(BATCH)
    bad = torch.cat([images[:7], torch.full_like(images[:1], float("nan")), images[7:]])
    logits = method(bad)
    assert torch.equal(logits[7], torch.zeros(5))
    twin(images)
    assert method.stats["gate_log_wealth"] == pytest.approx(twin.stats["gate_log_wealth"], abs=1e-9)
    method(torch.full_like(images, float("nan")))  # none is left
    assert method.stats["nonfinite_images"] == BATCH


def test_what_does_not_go_is_refused(source):
    net = make_net("gn")
    for wanted, text in (
        ("pome", "Unknown gate 'pome'. Did you mean poem"),
        ({"kind": "poem", "alpha": 2}, "^gate: alpha must be"),
        ({"kind": "poem", "patience": 0}, "^gate: patience must be"),
        ({"kind": "poem", "wait": 0}, "^gate 'poem' has no option 'wait'"),
    ):
        with pytest.raises(ConfigError, match=text):
            adapt(net, "tent", gate=wanted)
    with pytest.raises(ConfigError, match="exclude each other"):
        adapt(net, "tent", gate="poem", reservoir=4)
    method = adapt(net, "tent", gate="poem")
    with pytest.raises(NotPreparedError, match="must see source data"):
        method(make_images(BATCH))
    with pytest.raises(DataError, match="at least 10 held-out source images"):
        method.prepare([{"image": make_images(9)}])
    with pytest.raises(DataError, match="gate= and 'eata' both look at the source batches"):
        adapt(net, "eata", gate="poem").prepare(iter(source))


@pytest.mark.parametrize(
    ("name", "options"),
    [("memo", {"views": 2, "augment": "none"}), ("t3a", {}), ("sar", {}), ("rotta", {}), ("tent", {"window": 16})],
)
def test_any_method_takes_it(name, options, source):
    net = make_net("bn")
    method = adapt(net, name, gate={"kind": "poem", "patience": PATIENCE}, **options)
    method.prepare(source)
    flags = []
    for images in stream():
        logits = method(images)
        flags.append(method.stats["gate_open"])
        if not flags[-1]:
            assert torch.equal(logits, plain(net, images))
    assert flags == [float(flag) for flag in by_hand(net, source)]
