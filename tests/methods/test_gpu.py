"""What only a GPU can show: recorded steps are the plain ones, the same bits each time, and the numbers of a CPU."""

import warnings

import pytest
import torch
from test_tensors_only import ASKS_NOTHING

from contract import REFUSED, SETTINGS, VARIANTS, build, case_id, tensors_of
from nets import make_net, make_stream, same

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = "cuda"
KINDS = ("bn", "gn", "ln")
CASES = [(*setting, kind) for setting in SETTINGS for kind in KINDS if case_id(*setting, kind) not in REFUSED]
FIRST = [case for case in CASES if case[1] == VARIANTS.get(case[0], [{}])[0]]
BATCHES = 5  # two as they are, one recorded, two replayed


def make(case, device, dtype=torch.float32, **execution):
    name, options, kind = case
    return build(name, options, kind, net=make_net(kind).to(device, dtype), **execution)


def stream_on(device, dtype=torch.float32):
    return [images.to(device, dtype) for images in make_stream(BATCHES)]


def results(method, stream):
    """Logits and state after a stream, on the CPU."""
    logits = [method(images).cpu() for images in stream]
    state = {name: value.cpu() for name, value in tensors_of(method.state_dict()).items()}
    return {**{f"logits {n}": u for n, u in enumerate(logits)}, **state, **method.memory}


def difference(one, other):
    """The largest, over all tensors."""
    pairs = [(value, other[name]) for name, value in one.items() if isinstance(value, torch.Tensor)]
    gaps = [(a.cpu().double() - b.cpu().double()).abs() for a, b in pairs]
    return max(float(gap.nan_to_num(nan=0.0).max()) for gap in gaps if gap.numel())


def test_recorded_steps_are_the_plain_ones():
    wrong = {}
    kinds = [(torch.float32, "exact", 1e-3, CASES), (torch.float32, "bf16", 0.1, FIRST)]
    kinds += [(torch.bfloat16, None, 0.1, FIRST)]
    for dtype, precision, allowed, cases in kinds:
        for case in cases:
            plain = results(make(case, DEVICE, dtype, precision=precision, capture=False), stream_on(DEVICE, dtype))
            method = make(case, DEVICE, dtype, precision=precision)
            gap = difference(plain, results(method, stream_on(DEVICE, dtype)))
            report = method.capture_report()
            recorded = "recorded" in report.values() or case[0] not in ASKS_NOTHING
            if not (gap < allowed and report and recorded):
                wrong[f"{case_id(*case)}, {dtype}, {precision}"] = gap, report
    assert not wrong


def test_deterministic_is_the_same_bit_by_bit():
    """Two runs, a recorded one, one that was resumed, and one after a reset."""
    wrong = {}
    for case in FIRST:
        stream = stream_on(DEVICE)
        first = results(make(case, DEVICE, deterministic=True, capture=False), stream)
        runs = {"again": make(case, DEVICE, deterministic=True, capture=False)}
        runs["recorded"] = make(case, DEVICE, deterministic=True)
        runs["reset"] = make(case, DEVICE, deterministic=True)
        for images in stream:
            runs["reset"](images)
        runs["reset"].reset()
        halfway, runs["resumed"] = make(case, DEVICE, deterministic=True), make(case, DEVICE, deterministic=True)
        begun = [halfway(images).cpu() for images in stream[:2]]
        runs["resumed"].load_state_dict(halfway.state_dict())
        for name, method in runs.items():
            seen = results(method, stream[2:] if name == "resumed" else stream)
            if name == "resumed":
                logits = begun + [seen.pop(f"logits {n}") for n in range(BATCHES - 2)]
                seen |= {f"logits {n}": u for n, u in enumerate(logits)}
            unequal = [key for key, value in first.items() if not same(value, seen[key])]
            if unequal:
                wrong[f"{case_id(*case)}, {name}"] = unequal
    assert not wrong


def test_a_gpu_gives_what_a_cpu_gives():
    wrong = {}
    for case in CASES:
        here = results(make(case, DEVICE, precision="exact"), stream_on(DEVICE))
        gap = difference(here, results(make(case, "cpu", precision="exact"), stream_on("cpu")))
        if not gap < 1e-3:
            wrong[case_id(*case)] = gap
    assert not wrong


def test_a_recorded_step_waits_once():
    """For the check of the images; `stats` are read later."""
    waits = {}
    for case in FIRST:
        if case[0] in ASKS_NOTHING:
            method, (*before, last) = make(case, DEVICE), stream_on(DEVICE)
            for images in before:
                method(images)
            torch.cuda.synchronize()
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    method(last)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            lines = [f"{found.filename}:{found.lineno}" for found in seen if "synchroniz" in str(found.message)]
            if len(lines) > 1:
                waits[case_id(*case)] = lines
    assert not waits
