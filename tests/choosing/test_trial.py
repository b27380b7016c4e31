"""Candidates side by side: each as if it were alone, and what goes wrong is its own problem."""

import pytest
import torch

from lightning_tta import ConfigError, adapt
from lightning_tta.backbones import state_digest
from lightning_tta.choosing.candidates import Candidate, default_candidates, read_candidates
from lightning_tta.choosing.trial import Runner, finish
from nets import make_images, make_net

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {"lr": 0.02, "optimizer": "sgd"}


def batches(number=3, size=6):
    return list(make_images(number * size).split(size))


def test_each_answers_as_if_it_were_alone():
    net = make_net("bn")
    before = state_digest(net)
    runners = [Runner(Candidate(SOURCE), net), Runner(Candidate("tent", OPTIONS), net), Runner(Candidate("norm"), net)]
    alone = adapt(net, "tent", **OPTIONS)
    for images in batches():
        for runner in runners:
            runner(images)
        expected = alone(images)
        assert torch.equal(runners[1].answers[-1], expected)
    assert not torch.equal(runners[1].answers[-1], runners[2].answers[-1])
    assert state_digest(net) == before
    assert [runner.passes for runner in runners] == [3, 6, 3]  # Tent: a forward and a backward pass a batch


SOURCE = "source"


def test_features_are_those_of_the_answers():
    net = make_net("bn")
    for name in ("source", "tent", "zerosiam"):
        runner = Runner(Candidate(name), net)
        runner(make_images(8))
        weight, bias = adapt(net, "source").split.head.weight, adapt(net, "source").split.head.bias
        assert torch.allclose(runner.features[0] @ weight.T + bias, runner.answers[0], atol=1e-5), name


def test_resets_come_where_they_are_wanted():
    net, images = make_net("bn"), batches(4)
    runner = Runner(Candidate("tent", OPTIONS, reset_every=2), net)
    for batch in images:
        runner(batch)
    fresh = adapt(net, "tent", **OPTIONS)
    assert torch.equal(fresh(images[2]), runner.answers[2])
    assert torch.equal(fresh(images[3]), runner.answers[3])


@pytest.mark.parametrize(
    ("kind", "candidate", "words"),
    [
        ("gn", Candidate("norm"), "no BatchNorm"),
        ("bn", Candidate("eata"), "source images"),
        ("gn", Candidate("tlm"), "adapts on tokens"),
    ],
)
def test_a_candidate_that_cannot_run_says_why(kind, candidate, words):
    net = make_net(kind)
    runner = Runner(candidate, net)
    runner.prepare(None)
    for images in batches():
        runner(images)
    source = Runner(Candidate(SOURCE), net)
    for images in batches():
        source(images)
    assert list(finish([source, runner], batches())) == [SOURCE]
    assert words in runner.problem


@pytest.mark.parametrize(
    ("options", "words"), [({"rate": 1}, "'rate'"), ({"lr": -1}, "lr must"), ({"lr": "x"}, "lr must")]
)
def test_wrong_options_are_nothing_that_a_trial_could_show(options, words):
    with pytest.raises(ConfigError, match=words):
        Runner(Candidate("tent", options), make_net("bn"))


def test_logits_that_are_not_finite_end_a_candidate():
    net = make_net("bn")
    runners = [Runner(Candidate(SOURCE), net), Runner(Candidate("tent"), net), Runner(Candidate("norm"), net)]
    for number, images in enumerate(batches()):
        if number == 1:
            runners[1].method.model.head.register_forward_hook(lambda module, inputs, output: output * torch.inf)
        answers = [runner(images) for runner in runners]
        assert [answer is None for answer in answers] == [False, number > 0, False]
    assert "batch 1" in runners[1].problem
    assert list(finish(runners, batches())) == [SOURCE, "norm"]


def test_one_that_needs_source_images_gets_them():
    runner = Runner(Candidate("eata"), make_net("bn"))
    runner.prepare([{"image": make_images(8), "label": torch.arange(8) % 5}])
    assert runner(make_images(8)) is not None
    assert runner.problem == ""


def test_the_end_is_in_the_order_of_the_stream():
    net, images = make_net("gn"), batches()
    runners = [Runner(Candidate(SOURCE), net), Runner(Candidate("tent", OPTIONS), net)]
    for batch in images:
        for runner in runners:
            runner(batch)
    passes = runners[1].passes
    records = finish(runners, images)
    tent = records[runners[1].candidate.name]
    expected = torch.cat([runners[1].method.predict(batch) for batch in images])
    assert torch.allclose(tent.final, expected, atol=1e-5)  # of GroupNorm each image is predicted by itself
    assert not torch.allclose(tent.final, tent.answers, atol=1e-5)
    assert torch.allclose(tent.final_features @ tent.weight.T + tent.bias, tent.final, atol=1e-5)
    assert torch.equal(records[SOURCE].final, records[SOURCE].answers)
    assert not torch.allclose(records[SOURCE].view, records[SOURCE].answers)
    assert runners[1].passes - passes == 2 * len(images)


def test_company_shows_what_a_sorted_batch_does():
    net = make_net("bn")
    dark, bright = make_images(12) * 0.2, make_images(12) * 0.2 + 0.8
    images = [*dark.split(6), *bright.split(6)]
    runners = [Runner(Candidate(SOURCE), net), Runner(Candidate("norm"), net)]
    for batch in images:
        for runner in runners:
            runner(batch)
    record = finish(runners, images)["norm"]
    assert (record.answers - record.final).abs().mean() > 0.01


@pytest.mark.parametrize(("number", "groups"), [(6, [0, 0, 1, 1, 2, 2]), (5, [0, 0, 1, 1, 1])])
def test_company_is_of_neighboring_batches(monkeypatch, number, groups):
    net, images = make_net("bn"), batches(number, 4)
    runners = [Runner(Candidate(SOURCE), net), Runner(Candidate("norm"), net)]
    for batch in images:
        for runner in runners:
            runner(batch)
    seen = []
    monkeypatch.setattr(
        runners[1], "predict", lambda batch: (seen.append(batch), (torch.zeros(len(batch), 5), None))[1]
    )
    assert finish(runners, images)["norm"].sizes == [4] * number
    batch_of = {tuple(image.flatten().tolist()): place for place, batch in enumerate(images) for image in batch}
    shown = [[batch_of[tuple(image.flatten().tolist())] for image in batch] for batch in seen[::2]]  # without the views
    assert [{groups[place] for place in batch} for batch in shown] == [{group} for group in groups]
    assert any(len(set(batch)) > 1 for batch in shown)
    assert sorted(place for batch in shown for place in batch) == sorted(list(range(number)) * 4)


def test_what_is_given_is_read():
    net = make_net("bn")
    found = read_candidates(["tent", {"method": "Tent", "lr": 0.1, "reset_every": 5}, "tent", "source"], net, 64)
    assert found == [Candidate(SOURCE), Candidate("tent"), Candidate("tent", {"lr": 0.1}, 5)]
    assert found[2].name == "tent (lr 0.1, reset_every 5)"
    for wrong, words in (
        ("tint", "Did you mean tent"),
        ({"lr": 1}, "'method'"),
        (3, "'method'"),
        ({"method": "tent", "reset_every": 0}, "reset_every"),
    ):
        with pytest.raises(ConfigError, match=words):
            read_candidates([wrong], net, 64)


@pytest.mark.parametrize(("kind", "size"), [("bn", 64), ("bn", 4), ("gn", 64), ("none", 64)])
def test_the_grid_runs_on_the_nets_that_it_is_for(kind, size):
    from nets import TinyNet

    net = TinyNet("none", 5).eval() if kind == "none" else make_net(kind)
    grid = default_candidates(net, size)
    assert len({candidate.name for candidate in grid}) == len(grid) >= 3
    for candidate in grid:
        runner = Runner(candidate, net)
        for images in batches(2, 8):
            assert runner(images) is not None, f"{candidate.name}: {runner.problem}"
