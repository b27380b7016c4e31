"""Key-value recall: what a batch holds, seeds, distances, and what is refused."""

import pytest
import torch

from lightning_tta import ConfigError
from lightning_tta.data.recall import RecallData


def parsed(segments):
    """Pairs by their text: the letter or letters before each colon, the digits behind it; in order."""
    text = "".join(segments)
    found = {}
    for place in (i for i, character in enumerate(text) if character == ":"):
        value = text[place + 1 : text.index(";", place)]
        found[text[place - 2 : place]] = value
    return found


def test_questions_are_answered_by_their_context():
    data = RecallData(pairs=[2, 6], key_length=2, value_length=3, filler=2, pairs_per_segment=2, contexts=3)
    sizes = set()
    for index in range(20):
        batch = data.batches("train")[index]
        for d, (segments, asked) in enumerate(data.batches("train").texts(index)):
            pairs = parsed(segments)
            sizes.add(len(pairs))
            assert len(pairs) == 2 * len(segments)
            for q, (question, answer) in enumerate(asked):
                assert pairs[question[:-1]] == answer
                assert data.tokenizer.decode(batch["questions"][d, q]) == question + answer
                answers = batch["questions"][d, q][batch["answer_mask"][d, q]]
                assert data.tokenizer.decode(answers) == answer
            assert "".join(data.tokenizer.decode(row) for row in batch["segments"][d]) == "".join(segments)
        assert batch["segment_mask"].all()
    assert sizes == {2, 4, 6}


def test_a_seed_gives_the_same_batches_and_splits_differ():
    def first(split, **options):
        return RecallData(pairs=8, **options).batches(split, 8)[1]["segments"]

    assert torch.equal(first("train"), first("train"))
    others = [first("train", seed=1), first("val"), first("test")]
    assert all(not torch.equal(first("train"), other) for other in others)
    again = RecallData(pairs=8).batches("train", 8)[2]["segments"]
    assert not torch.equal(first("train"), again)


def test_values_are_uniform_and_tell_nothing_of_keys():
    data = RecallData(pairs=8, value_length=1, contexts=100)
    values = torch.cat([data.batches("train")[i]["questions"][..., -1].flatten() for i in range(5)])
    counts = torch.bincount(values - values.min(), minlength=10)
    assert (counts / counts.sum() - 0.1).abs().max() < 0.02  # 4,000 draws: standard deviation 0.005


@pytest.mark.parametrize(("asked", "places"), [([0.0, 0.25], {6, 7}), ([0.75, 1.0], {0, 1}), ([0.0, 0.01], {7})])
def test_distance_of_what_is_asked(asked, places):
    data = RecallData(pairs=8, asked=asked)
    for index in range(5):
        for segments, questions in data.batches("train").texts(index):
            order = [segment[0] for segment in segments]
            assert {order.index(question[0]) for question, _ in questions} == places


def test_loaders():
    data = RecallData(pairs=[2, 4], test_pairs=[4, 12], train_batches=3, val_batches=2, test_batches=1, contexts=2)
    assert [len(loader) for loader in (data.train_dataloader(), data.val_dataloader())] == [3, 2]
    assert [next(iter(loader))["segments"].shape[1] for loader in data.test_dataloader()] == [4, 12]
    assert data.test_names == ["4_pairs", "12_pairs"]
    assert next(iter(data.val_dataloader()))["segments"].shape == (2, 4, 5)
    with pytest.raises(IndexError):
        data.batches("val")[2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pairs": 0}, "pairs"),
        ({"pairs": [4, 2]}, "low, high"),
        ({"pairs": 60}, "52"),
        ({"pairs": 8, "test_pairs": [16], "letters": "abcdefghij"}, "test_pairs"),
        ({"pairs": 6, "pairs_per_segment": 4}, "multiples"),
        ({"letters": "aab"}, "each once"),
        ({"letters": "a1"}, "no digit"),
        ({"asked": [0.5, 0.5]}, "asked"),
        ({"contexts": 0}, "contexts"),
        ({"filler": -1}, "filler"),
    ],
    ids=str,
)
def test_what_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        RecallData(**options)
