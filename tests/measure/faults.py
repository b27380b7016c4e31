"""What every method makes of bad input and unusual models: a table, checked entry by entry.

    python tests/measure/faults.py > faults.md

Each entry compares the method with a twin that never saw the fault. ``same``: the twin's logits on plain input;
``left out``: the good images as if the broken ones had not come, zero logits for those; ``finite``: an input with no
other right answer, taken in; ``refused``: an error of this package that names a remedy, and nothing changed.
``unsupported``: the method says that it cannot run on this net. After every fault the next good batch must be
predicted as by the twin. Anything else is ``WRONG``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fault_cases import CLASSES, FAULTS, FINITE, LEFT_OUT, MODELS, OPTIONS, OTHERS, REFUSED, SAME, net
from lightning_tta.errors import InputError, UnsupportedModelError
from lightning_tta.methods import TTAMethod, available_methods
from plumbing import arguments, header, make_images, row, same

KINDS = ("bn", "gn", "ln")
Factory = Callable[[nn.Module], TTAMethod]


def build(factory: Factory, model: nn.Module) -> TTAMethod:
    """The method around ``model``, prepared where it needs source data."""
    method = factory(model)
    if not method.prepared:
        labels = torch.arange(8) % CLASSES
        method.prepare([{"image": make_images(8, 50 + number), "label": labels} for number in range(2)])
    return method


class Wrong(Exception):
    """What a method made of a fault was not right."""


def _check(right: bool, what: str) -> None:
    if not right:
        raise Wrong(what)


def outcome(factory: Factory, kind: str, fault: str) -> str:
    """The table's word for what the method does: see the module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            factory(net(kind))
        except UnsupportedModelError:
            return "unsupported"
        try:
            return _outcome(factory, kind, fault)
        except Wrong as wrong:
            return f"WRONG: {wrong}"
        except Exception as error:  # recorded, whatever it is
            return f"WRONG: {type(error).__name__}: {str(error).splitlines()[:1]}"


def _outcome(factory: Factory, kind: str, fault: str) -> str:
    if fault in MODELS:
        return _model(factory, kind, MODELS[fault])
    if fault in OTHERS:
        return _other(factory, kind, fault)
    method, twin = build(factory, net(kind)), build(factory, net(kind))
    first, images, after = make_images(6, 1), make_images(6, 2), make_images(6, 3)
    _check(torch.equal(method(first), twin(first)), "not deterministic")
    if fault in REFUSED:
        for call in (method, method.predict):
            _check_refusal(call, REFUSED[fault](images))
        word = "refused"
    elif fault in LEFT_OUT:
        given = LEFT_OUT[fault](images)
        good = given.flatten(1).isfinite().all(1)
        logits, expected = method(given), twin(images[good]) if bool(good.any()) else torch.zeros(0, CLASSES)
        _check(torch.equal(logits[good], expected), "the good images are predicted otherwise")
        _check(not bool(logits[~good].any()), "logits for broken images")
        word = "left out"
    elif fault in FINITE:
        given = FINITE[fault](images)
        logits = method(given)
        _check(logits.shape == (len(given), CLASSES) and bool(logits.isfinite().all()), "not finite")
        _check(torch.equal(logits, twin(given)), "not deterministic")
        _check(_all_finite(method), "state is not finite")
        word = "finite"
    else:
        given, plain = (change(images) for change in SAME[fault])
        _check(_close(method.predict(given), twin.predict(plain)), "predicted otherwise")
        _check(_close(method(given), twin(plain)), "logits differ")
        _check(_close(method(after), twin(after)), "the next batch differs")
        return "same"
    _check(same(method.state_dict(), twin.state_dict()), "state differs from the twin's")
    logits = method(after)
    _check(bool(logits.isfinite().all()) and torch.equal(logits, twin(after)), "the next batch differs")
    return word


def _check_refusal(call: Callable[[Any], Tensor], given: Any) -> None:
    try:
        call(given)
    except InputError as error:
        _check(any(word in str(error) for word in ("Give ", "Move ")), f"no advice: {error}")
    else:
        raise Wrong("accepted in silence")


def _model(factory: Factory, kind: str, change: Callable[[nn.Module], nn.Module]) -> str:
    method, twin = build(factory, change(net(kind))), build(factory, net(kind))
    for seed in (1, 2, 3):
        images = make_images(6, seed)
        _check(torch.equal(method(images), twin(images)), "logits differ")
    _check(torch.equal(method.predict(images), twin.predict(images)), "predicted otherwise")
    return "same"


def _other(factory: Factory, kind: str, fault: str) -> str:
    images = make_images(6, 2)
    if fault == "no norm layers":
        try:
            method = build(factory, net("none"))
        except UnsupportedModelError as error:
            _check("norm" in str(error).lower(), f"no reason: {error}")
            return "refused"
        _check(bool(method(images).isfinite().all()), "not finite")
        return "finite"
    if fault == "model without values (meta)":
        try:
            factory(net(kind).to("meta"))
        except UnsupportedModelError as error:
            _check("meta" in str(error), f"no reason: {error}")
            return "refused"
        raise Wrong("accepted in silence")
    if fault == "model on another device":
        if not torch.cuda.is_available():
            return "not run (no GPU)"
        method, twin = build(factory, net(kind)).to("cuda"), build(factory, net(kind)).to("cuda")
        for call in (method, method.predict):
            _check_refusal(call, images)
        _check(same(method.state_dict(), twin.state_dict()), "state differs from the twin's")
        _check(bool(method(images.to("cuda")).isfinite().all()), "not finite")
        return "refused"
    model = net(kind)
    with torch.no_grad():
        model.head.bias[2] = -1e3
    method = build(factory, model)
    for seed in (1, 2, 3):
        _check(bool(method(make_images(6, seed)).isfinite().all()), "not finite")
    _check(_all_finite(method), "state is not finite")
    return "finite"


def _all_finite(method: TTAMethod) -> bool:
    """Whether all that the method may change is finite; what has no value yet does not count."""
    tensors = (*method.state_dict().values(), *method.memory.values())
    return all(bool(x.isfinite().all()) for x in tensors if isinstance(x, Tensor))


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-3, atol=1e-3)


def factories() -> dict[str, Factory]:
    """Every method, with :data:`OPTIONS`."""
    return {name: partial(method, **OPTIONS.get(name, {})) for name, method in available_methods().items()}


def main(args: list[str] | None = None) -> dict[str, dict[str, list[str]]]:
    """Print the table as Markdown, one for each kind of net; returns it by net, fault and method."""
    options = arguments(__doc__, args, methods=list(available_methods()))
    chosen = {name: factory for name, factory in factories().items() if name in options.methods}
    tables = {}
    for kind in KINDS:
        print(f"\n## {kind}\n")
        header("", *chosen)
        tables[kind] = {fault: [outcome(factory, kind, fault) for factory in chosen.values()] for fault in FAULTS}
        for fault, words in tables[kind].items():
            row(fault, *words)
    wrong = sum(word.startswith("WRONG") for table in tables.values() for words in table.values() for word in words)
    print(f"\n{wrong} wrong of {sum(len(words) for table in tables.values() for words in table.values())}")
    return tables


if __name__ == "__main__":
    main()
