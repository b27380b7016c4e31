"""Recall of keys and values: contexts of pairs ``k:v;``, questions ``k:``, answers ``v``; made from a seed."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_tta.backbones.tokenizer import CharTokenizer
from lightning_tta.errors import ConfigError, check_range

SPLITS = ("train", "val", "test")
Split = Literal["train", "val", "test"]


class RecallBatches(Dataset[dict[str, Tensor]]):
    """Batches of contexts with questions; the n-th is a pure function of the seed, the split and n.

    Each is ``{segments, segment_mask, questions, answer_mask}``: token ids (D, S, T) of D contexts in S segments, with
    a bool of which are no padding; and token ids (D, Q, L) of Q questions of each context, every one with its answer
    at the end, with a bool of which tokens are answer. Nothing is padded, for all pairs are of one length.

    Args:
        data: The options.
        split: Which stream of contexts.
        pairs: The number of pairs of each context: one, or the bounds of a draw for each batch.
        number: Of batches.
    """

    def __init__(self, data: RecallData, split: Split, pairs: int | tuple[int, int], number: int) -> None:
        self.data, self.split, self.pairs, self.number = data, split, pairs, number

    def __len__(self) -> int:
        return self.number

    def texts(self, index: int) -> list[tuple[list[str], list[tuple[str, str]]]]:
        """Of a batch, for each context: its segments, and questions with their answers."""
        if not 0 <= index < self.number:
            raise IndexError(index)
        data = self.data
        rng = np.random.default_rng([data.seed, SPLITS.index(self.split), index])
        low, high = self.pairs if isinstance(self.pairs, tuple) else (self.pairs, self.pairs)
        together = data.pairs_per_segment
        number = int(rng.integers(low // together, high // together + 1)) * together
        # a question's number counts back from the last pair: 0 is asked right after it was said
        first, last = (round(bound * number) for bound in data.asked)
        last = max(last, first + 1)
        found = []
        for _ in range(data.contexts):
            keys = rng.choice(len(data.letters) ** data.key_length, number, replace=False)
            values = rng.integers(10**data.value_length, size=number)
            noise = rng.integers(len(data.letters), size=(number, data.filler))
            words = [self._word(int(key)) for key in keys]
            answers = [f"{value:0{data.value_length}d}" for value in values]
            pairs = [
                f"{word}:{answer};" + "".join(data.letters[n] for n in row)
                for word, answer, row in zip(words, answers, noise, strict=True)
            ]
            asked = number - 1 - rng.choice(np.arange(first, last), min(data.questions, last - first), replace=False)
            segments = ["".join(pairs[i : i + together]) for i in range(0, number, together)]
            found.append((segments, [(f"{words[i]}:", answers[i]) for i in asked]))
        return found

    def _word(self, key: int) -> str:
        base = len(self.data.letters)
        return "".join(self.data.letters[key // base**place % base] for place in range(self.data.key_length))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        encode = self.data.tokenizer.encode
        texts = self.texts(index)
        segments = torch.tensor([[encode(text, False) for text in segments] for segments, _ in texts])
        questions = torch.tensor([[encode(q + a, False) for q, a in asked] for _, asked in texts])
        answer_mask = torch.zeros_like(questions, dtype=torch.bool)
        answer_mask[..., -self.data.value_length :] = True
        return {
            "segments": segments,
            "segment_mask": torch.ones_like(segments, dtype=torch.bool),
            "questions": questions,
            "answer_mask": answer_mask,
        }


class RecallData(LightningDataModule):
    """Key-value recall: a context such as ``a:17;`` ``q:42;`` ``b:90;``, the question ``q:`` and its answer ``42``.

    Keys of a context differ from each other, and are drawn anew with their values for each: nothing of one context
    helps in another one, and without it an answer is a guess, right once in 10^``value_length``. Batches are those of
    :class:`RecallBatches`. Test contexts may be longer than those of training: ``test_pairs`` has a loader for each.

    Args:
        pairs: The number of pairs of a context in training: one, or ``[low, high]`` for a draw for each batch.
        val_pairs: The same of validation; ``None``: the most of training.
        test_pairs: Numbers of pairs, a test loader each; ``None``: once, twice and four times the most of training.
        key_length: Letters of a key.
        value_length: Digits of a value.
        letters: What keys are made of.
        filler: Random letters after each pair, which say nothing: the distance between pairs.
        pairs_per_segment: Pairs that stand together in one segment; divides all numbers of pairs.
        asked: Which pairs are asked for, as a part of the context counted back from its end: ``[0, 1]`` all of it,
            ``[0.75, 1]`` the first quarter, which is the farthest from the question.
        questions: Of a context, at most.
        contexts: Of a batch, D.
        train_batches: Of an epoch; each epoch has the same ones.
        val_batches: Of validation.
        test_batches: Of each test loader.
        seed: Of everything.

    Attributes:
        tokenizer: Characters of ASCII as tokens.

    Raises:
        ConfigError: On a value out of range, or fewer keys than pairs.
    """

    name = "recall"

    def __init__(
        self,
        pairs: int | list[int] = 8,
        val_pairs: int | None = None,
        test_pairs: list[int] | None = None,
        key_length: int = 1,
        value_length: int = 2,
        letters: str = string.ascii_letters,
        filler: int = 0,
        pairs_per_segment: int = 1,
        asked: list[float] | None = None,
        questions: int = 8,
        contexts: int = 16,
        train_batches: int = 100,
        val_batches: int = 8,
        test_batches: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        counts = {"key_length": key_length, "value_length": value_length, "pairs_per_segment": pairs_per_segment}
        counts |= {"questions": questions, "contexts": contexts, "train_batches": train_batches}
        for option, value in {**counts, "val_batches": val_batches, "test_batches": test_batches}.items():
            check_range(option, value, 1, integer=True)
        check_range("filler", filler, 0, integer=True)
        check_range("seed", seed, 0, integer=True)
        bounds = list(pairs) if isinstance(pairs, (list, tuple)) else [pairs, pairs]
        if len(bounds) != 2 or bounds[0] > bounds[1]:
            raise ConfigError(f"pairs must be a number, or [low, high]; got {pairs!r}.")
        self.pairs = (bounds[0], bounds[1])
        self.val_pairs = bounds[1] if val_pairs is None else val_pairs
        self.test_pairs = [bounds[1] * times for times in (1, 2, 4)] if test_pairs is None else list(test_pairs)
        self.asked = tuple([0.0, 1.0] if asked is None else asked)
        if len(self.asked) != 2 or not 0 <= self.asked[0] < self.asked[1] <= 1:
            raise ConfigError(f"asked must be two numbers in [0, 1], the smaller one first; got {asked!r}.")
        known = set(CharTokenizer().characters) - set(string.digits + ":;")
        if len(letters) < 2 or len(set(letters)) < len(letters) or not set(letters) <= known:
            raise ConfigError(f"letters must be two or more, each once, no digit, ':' or ';'; got {letters!r}.")
        for option, values in {"pairs": bounds, "val_pairs": [self.val_pairs], "test_pairs": self.test_pairs}.items():
            for value in values:
                check_range(option, value, 1, len(letters) ** key_length, integer=True)
                if value % pairs_per_segment:
                    raise ConfigError(
                        f"{option} must be multiples of pairs_per_segment={pairs_per_segment}; got {value}."
                    )
        self.key_length, self.value_length, self.letters, self.filler = key_length, value_length, letters, filler
        self.pairs_per_segment, self.questions, self.contexts, self.seed = pairs_per_segment, questions, contexts, seed
        self.numbers = {"train": train_batches, "val": val_batches, "test": test_batches}
        self.tokenizer = CharTokenizer()

    @property
    def test_names(self) -> list[str]:
        """Of the test loaders: their numbers of pairs."""
        return [f"{pairs}_pairs" for pairs in self.test_pairs]

    def batches(self, split: Split, pairs: int | Sequence[int] | None = None) -> RecallBatches:
        """The batches of a split; ``pairs`` in place of those of the options."""
        if pairs is None:
            pairs = self.pairs if split == "train" else self.val_pairs if split == "val" else self.test_pairs[0]
        bounds = pairs if isinstance(pairs, int) else (pairs[0], pairs[1])
        return RecallBatches(self, split, bounds, self.numbers[split])

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Shuffled batches."""
        return DataLoader(self.batches("train"), batch_size=None, shuffle=True)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Batches in order."""
        return DataLoader(self.batches("val"), batch_size=None)

    def test_dataloader(self) -> list[DataLoader[dict[str, Tensor]]]:
        """A loader for each number of pairs of ``test_pairs``."""
        return [DataLoader(self.batches("test", pairs), batch_size=None) for pairs in self.test_pairs]

    def predict_dataloader(self) -> list[DataLoader[dict[str, Tensor]]]:
        """The same."""
        return self.test_dataloader()
