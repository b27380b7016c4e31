"""Two processes that adapt as one: the same as one process with the joined batch."""

import math
from itertools import product

import pytest
import torch
from torch import distributed

from lightning_tta import adapt, available_methods, collective
from lightning_tta.methods import Tent
from nets import make_images, make_net
from processes import MARKS, Processes

pytestmark = MARKS
ETA = {"entropy_margin": 0.7, "diversity_margin": 0.95, "lr": 0.05}
ETA_GN = {"entropy_margin": 0.75, "diversity_margin": 0.995, "lr": 0.02}  # this net's predictions are more alike
CASES = {
    "source": ("source", "user", {}),
    "norm": ("norm", "bn", {}),
    "norm mixed": ("norm", "user", {"source_weight": 0.7}),
    "norm average": ("norm", "bn", {"momentum": 0.2}),
    "neo": ("neo", "bn", {}),
    "neo continual": ("neo", "ln", {"momentum": 0.3}),
    "neo source": ("neo", "user", {"center": "source"}),
    "neo balanced": ("neo", "gn", {"balanced": True}),
    "neo source balanced": ("neo", "gn", {"center": "source", "balanced": True}),
    "label shift": ("label_shift_adapter", "gn", {"momentum": 0.5, "epochs": 2}),
    "output shift": ("output_shift", "bn", {"momentum": 0.3}),
    "tent": ("tent", "bn", {"lr": 0.01}),
    "tent user": ("tent", "user", {"lr": 0.05, "optimizer": "sgd", "steps": 2}),
    "tent filter": ("tent", "bn", {"lr": 0.01, "source_filter": True, "lr_batch_size": 4}),
    "tent gn": ("tent", "gn", {"lr": 0.01, "weight_decay": 0.1}),
    "tent adapters": ("tent", "bn", {"lr": 0.01, "select": ["norm", {"kind": "lora", "rank": 2}]}),
    "come": ("come", "bn", {"lr": 0.01}),
    "shot": ("shot", "bn", {"lr": 0.05, "label_weight": 2.0}),
    "shot confident": ("shot", "gn", {"lr": 0.05, "labels": "confident", "threshold": 0.5}),
    "cafa": ("cafa", "bn", {"lr": 0.01}),
    "actmad": ("actmad", "bn", {"lr": 0.05}),
    "rpl": ("rpl", "bn", {"lr": 0.01}),
    "zerosiam": ("zerosiam", "bn", {"lr": 0.02, "predictor_lr": 0.2}),
    "zerosiam ln": ("zerosiam", "ln", {"lr": 0.02, "predictor_lr": 0.2, "source_filter": True}),
    "rem": ("rem", "vit", {"lr": 0.01, "masked": 0.3, "margin": 0.1, "lr_batch_size": 4}),
    "eta": ("eta", "bn", ETA),
    "eta filter": ("eta", "ln", {**ETA_GN, "source_filter": True}),
    "eta gn": ("eta", "gn", ETA_GN),
    "eata": ("eata", "bn", {**ETA, "fisher_alpha": 50.0}),
    "conjugate pl": ("conjugate_pl", "bn", {"lr": 0.1, "source_loss": "poly"}),
    "delta": ("delta", "bn", {"lr": 0.01, "entropy_margin": None}),
    "pea": ("pea", "bn", {"group_size": 1, "momentum": 0.3}),
    "eata gn": ("eata", "gn", {**ETA_GN, "fisher_alpha": 50.0}),
    "prior em": ("source", "gn", {"prior": {"kind": "em", "window": 8}}),
    "prior moving": ("tent", "bn", {"lr": 0.01, "prior": {"kind": "moving", "momentum": 0.5}}),
}
SIZES = [6, 6, 5, 1, 6, 7, 6, 2, 6, 3]


def stream(dtype):
    """Ten batches, some with images that are broken: one, and all that the second process has."""
    batches = [make_images(size, seed=number, dtype=dtype) for number, size in enumerate(SIZES)]
    batches[4][1, 0, 3, 3] = math.nan
    batches[6][3:] = math.inf
    batches[7][:] = math.nan
    return batches


def run(name, dtype, rank=0, world=1):
    """What comes of a case: logits, adapted tensors, memory, and loss and kept share of each batch."""
    method, kind, options = CASES[name]
    method = adapt(make_net(kind).to(dtype), method, **options)
    if method.needs_source:
        images = [make_images(8, seed=900 + number, dtype=dtype) for number in range(3)]
        method.prepare([{"image": each, "label": torch.arange(8) % 5} for each in images])
    logits, stats = [], []
    for batch in stream(dtype):
        part = batch.tensor_split(world)[rank]
        with collective.joined(world, present=len(part) > 0):
            found = method(part if len(part) else batch[:1])
            predicted = method.predict(part if len(part) else batch[:1], statistics="batch")
        logits.append(torch.cat([found, predicted], 1)[: len(part)])
        names = ("loss", "kept", "spread", "online_entropy", "skipped_steps", "backwards")
        stats.append({key: method.stats[key] for key in names if key in method.stats})
    tensors = {key: tensor.detach() for key, tensor in method.adaptable.items()}
    return {"logits": logits, "stats": stats, "tensors": tensors, "memory": method.memory}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """What comes of all cases on each of two processes."""
    root = tmp_path_factory.mktemp("together")

    def work(rank):
        torch.set_num_threads(1)
        distributed.init_process_group("gloo", init_method=f"file://{root / 'meet'}", rank=rank, world_size=2)
        cases = product(CASES, (torch.float32, torch.float64))
        torch.save({(name, dtype): run(name, dtype, rank, 2) for name, dtype in cases}, root / f"out.{rank}")
        distributed.destroy_process_group()

    Processes(work, root / "out").succeed()
    return [torch.load(root / f"out.{rank}") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one_with_the_joined_batch(parts, name, dtype, tolerance):
    expected = run(name, dtype)
    parts = [part[name, dtype] for part in parts]
    for number, logits in enumerate(expected["logits"]):
        found = torch.cat([part["logits"][number] for part in parts])
        torch.testing.assert_close(found, logits, rtol=tolerance, atol=tolerance)
    for part in parts:
        for kind in ("tensors", "memory"):
            assert part[kind].keys() == expected[kind].keys()
            for key, value in expected[kind].items():
                torch.testing.assert_close(part[kind][key], value, rtol=tolerance, atol=tolerance)
                if value is not None:
                    assert torch.equal(part[kind][key], parts[0][kind][key])  # the processes stay one
        for found, wanted in zip(part["stats"], expected["stats"], strict=True):
            assert found == pytest.approx(wanted, rel=10 * tolerance, abs=10 * tolerance)


def test_every_synchronised_method_has_a_case():
    synchronised = {
        name for name, kind in available_methods().items() if "synchronised" in kind.parallel and "images" in kind.tasks
    }
    assert synchronised == {method for method, _, _ in CASES.values()}
    assert {"source", "norm", "tent", "zerosiam", "eta", "eata"} <= synchronised


def test_the_cases_are_what_they_should_be():
    """Adaptation matters, filters keep some, and sometimes none of what one process has."""
    assert min(SIZES) == 1
    for name, (method, _, _) in CASES.items():
        result = run(name, torch.float64)
        if "descend" in dir(available_methods()[method]) and name != "eta filter":
            assert sum(stats["backwards"] for stats in result["stats"]) >= 5, name
        if method in ("eta", "eata") and name != "eta filter":
            kept = [stats["kept"] for stats in result["stats"] if "kept" in stats]
            assert sum(0 < share < 1 for share in kept) >= 4
            alone = [
                round(stats.get("kept", 0) * size) == 1 < size
                for stats, size in zip(result["stats"], SIZES, strict=True)
            ]
            assert any(alone)  # one sample kept: the other process keeps none
            assert result["memory"]["mean_probability"] is not None


def test_a_subclass_says_for_itself_what_it_supports():
    class Same(Tent):
        pass

    class Mine(Tent):
        synchronized = False

        def step(self, x):
            return super().step(x)

    assert "synchronised" in Tent.parallel
    assert Same.parallel == Tent.parallel  # with Tent's own step
    assert Mine.parallel == {"replicas"}
    with pytest.raises(TypeError, match=r"Silent overrides step.*synchronized = True"):

        class Silent(Tent):
            def step(self, x):
                return super().step(x)
