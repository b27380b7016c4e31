"""The fault table: every method and every mechanism's nets against every fault; and that the table can say WRONG."""

import pytest
import torch

import fault_cases
import faults
from contract import IMAGE_METHODS, MECHANISMS, spread
from faults import KINDS
from lightning_tta import InputError, UnsupportedModelError, adapt
from lightning_tta.methods import Source, Tent
from nets import TOKENS_ONLY, make_images

pytestmark = pytest.mark.usefixtures("one_thread")

EXPECTED = {
    **dict.fromkeys(fault_cases.LEFT_OUT, "left out"),
    **dict.fromkeys(fault_cases.REFUSED, "refused"),
    **dict.fromkeys(fault_cases.FINITE, "finite"),
    **dict.fromkeys(fault_cases.SAME, "same"),
    **dict.fromkeys(fault_cases.MODELS, "same"),
    "model without values (meta)": "refused",
    "a class never predicted": "finite",
}
WITHOUT_NORM = {
    "source",
    "lame",
    "t3a",
    "adanpc",
    "neo",
    "output_shift",
    "memo",
    "cotta",
    "shot",
    "zero",
    "view_averaging",
}  # need no norm layers
ONE_SIZE = {"actmad"}  # take images of the size of the source images alone
BN_ONLY = {"norm", "single_image_bn", "meta_ttt"}


# Every method on its first net; on all nets one method of each mechanism, and those that refuse some.
ON_ALL_NETS = BN_ONLY | {name for name, _ in MECHANISMS.values()}
TABLE = [(name, kind) for name in IMAGE_METHODS for kind in KINDS if kind == "bn" or name in ON_ALL_NETS]


@pytest.mark.parametrize(("name", "kind"), TABLE)
def test_fault_table(name, kind):
    factory = faults.factories()[name]
    seldom = [*fault_cases.MODELS, *fault_cases.REFUSED, *fault_cases.SAME]  # what the base does, alike for all
    some = [fault for fault, _ in spread(((fault, name) for fault in seldom), 3, lambda pair: pair[1])]
    chosen = [fault for fault in fault_cases.FAULTS if fault in some or fault not in seldom]
    found = {fault: faults.outcome(factory, kind, fault) for fault in chosen}
    if set(found.values()) == {"unsupported"}:
        assert name in TOKENS_ONLY or (name in BN_ONLY and kind != "bn")
        return
    device = found.pop("model on another device")
    assert device == ("refused" if torch.cuda.is_available() else "not run (no GPU)")
    if name in ONE_SIZE:
        assert "compares positions" in found["larger frames, 24 x 24"]
        found["larger frames, 24 x 24"] = "finite"
    norm = found.pop("no norm layers")
    if name in WITHOUT_NORM | BN_ONLY:
        assert norm == ("finite" if name in WITHOUT_NORM else "refused")
    assert norm in ("finite", "refused")
    assert found == {fault: outcome for fault, outcome in EXPECTED.items() if fault in chosen}


class Swallows(Source):
    """Predicts something for whatever it is given."""

    def forward(self, images):
        try:
            return super().forward(images)
        except InputError:
            return torch.zeros(6, 5)


class Poisoned(Tent):
    """Adapts before it looks, and so keeps what an unusable batch did."""

    synchronized = False

    def step(self, x):
        with torch.no_grad():
            next(iter(self.adaptable.values())).add_(x.mean())
        return super().step(x)


class TakesEverything(Tent):
    """Lets broken images into the step."""

    def forward(self, images):
        return super().forward(images.nan_to_num(0.5, 0.5, 0.5))


class Plain(Source):
    """Raises what the net raises."""

    def forward(self, images):
        return self.model(images)


@pytest.mark.parametrize(
    ("method", "fault", "words"),
    [
        (Swallows, "empty batch", "silence"),
        (Swallows, "1 channel", "silence"),
        (Poisoned, "too small, 2 x 2", "state"),
        (Poisoned, "1 channel", "state"),
        (TakesEverything, "NaN in some images", "logits for broken images|otherwise"),
        (TakesEverything, "all images NaN", "logits"),
        (Plain, "1 channel", "RuntimeError"),
        (Plain, "compiled model", None),
    ],
)
def test_the_table_finds_what_is_wrong(method, fault, words):
    found = faults.outcome(method, "bn", fault)
    if words is None:
        assert found == "same"
    else:
        assert found.startswith("WRONG")
        assert any(word in found for word in words.split("|"))


def test_the_table_is_printed(capsys):
    tables = faults.main(["--methods", "source", "norm"])
    assert set(tables) == set(KINDS)
    printed = capsys.readouterr().out
    assert "| NaN in some images | left out | left out |" in printed
    assert "| empty batch | unsupported | refused |" in printed  # methods are listed by name: norm, source
    assert f"0 wrong of {3 * 2 * len(fault_cases.FAULTS)}" in printed


def test_a_refusal_quotes_the_net_and_the_shape():
    method = adapt(fault_cases.net("bn"), "tent")
    with pytest.raises(InputError, match=r"\(2, 1, 16, 16\).*channels.*Give the channels"):
        method(make_images(2, 1)[:, :1])


def test_an_error_that_is_not_the_inputs_fault_is_passed_on():
    class Broken(Tent):
        synchronized = False

        def step(self, x):
            raise RuntimeError("a bug in the method")

    method = Broken(fault_cases.net("bn"))
    with pytest.raises(RuntimeError, match="a bug in the method"):
        method(make_images(2, 1))


def test_compiled_parts_are_taken_apart():
    net = fault_cases.net("bn")
    net.norm2 = torch.compile(net.norm2, backend="eager")
    with pytest.warns(UserWarning, match="uncompiled"):
        method = adapt(net, "tent", in_place=True)
    assert isinstance(method.model.norm2, torch.nn.BatchNorm2d)
    assert set(method.adaptable) == set(adapt(fault_cases.net("bn"), "tent").adaptable)


def test_a_model_without_values_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"conv1\.weight.*to_empty"):
        adapt(fault_cases.net("bn").to("meta"), "source")
