"""The contest of methods against its equations in plain loops, in float64: evidence in, decision out."""

import math

import numpy as np
import pytest
import torch

from lightning_tta import ConfigError
from lightning_tta.evidence.contest import Contest


def softmax(logits):
    e = np.exp(logits - logits.max())
    return e / e.sum()


def h(p):
    """Entropy over log K."""
    return -sum(x * math.log(x) for x in p if x > 0) / math.log(len(p))


class PlainContest:
    """The same by hand: for each rival lists, for each image a loop."""

    def __init__(self, rivals, classes, **options):
        self.o = {"recent": 128, "horizon": 1024, "margin": 0.05, "hysteresis": 0.03, "fall": 0.3, **options}
        self.rivals = [self.new(classes) for _ in range(rivals)]

    def new(self, classes):
        return {"recent": np.zeros(classes), "long": np.zeros(classes), "u": 0.0, "d": 0.0, "n": 0}

    def information(self, r):
        return max(h(r["recent"]), h(r["long"])) - r["u"]

    def see(self, batch):
        """Logits (B, K) by rival."""
        p = {c: [softmax(row) for row in rows] for c, rows in batch.items()}
        for c, rows in p.items():
            r, count = self.rivals[c], len(rows)
            now, before = (count / (min(r["n"], self.o[w]) + count) for w in ("recent", "horizon"))
            mean = sum(rows) / count
            r["recent"], r["long"] = r["recent"] * (1 - now) + mean * now, r["long"] * (1 - before) + mean * before
            r["u"] = r["u"] * (1 - now) + now * sum(map(h, rows)) / count
        votes = {c: max(self.information(self.rivals[c]), 0.01) ** 2 for c in p}
        for c, rows in p.items():
            r, count = self.rivals[c], len(rows)
            outvoted = 0
            for b in range(count):
                others = sum(votes[o] * p[o][b] for o in p if o != c)
                outvoted += len(p) > 1 and others.argmax() != rows[b].argmax()
            now = count / (min(r["n"], self.o["recent"]) + count)
            r["d"] = r["d"] * (1 - now) + now * outvoted / count
        for c, rows in p.items():
            self.rivals[c]["n"] += len(rows)

    def standings(self):
        enough = self.o["recent"] / 4
        return [self.information(r) - r["d"] if r["n"] >= enough else -math.inf for r in self.rivals]

    def decide(self, answering):
        s = self.standings()
        fallen = [c for c in range(len(s)) if s[c] != -math.inf and s[c] < s[0] - self.o["fall"]]
        if s[0] == -math.inf or answering in fallen:
            return 0, fallen
        worth = [s[0] + self.o["margin"], *s[1:]]
        best = worth.index(max(worth))
        needed = 0 if best == 0 else self.o["hysteresis"]
        return (best if worth[best] - worth[answering] > needed else answering), fallen


@pytest.mark.parametrize("classes", [2, 7])
def test_evidence_and_decisions(classes):
    rng = np.random.default_rng(classes)
    options = {"recent": 24, "horizon": 80, "margin": 0.04, "hysteresis": 0.02, "fall": 0.25}
    contest, plain = Contest(**options), PlainContest(4, classes, **options)
    evidence = torch.zeros(4, 2 * classes + 3, dtype=torch.float64)
    answering, seen, fell = 0, set(), 0
    for turn in range(60):
        rivals = [c for c in range(4) if c == 0 or rng.random() < 0.8]
        count, quality = int(rng.integers(1, 13)), [[1, 4, 2, 3], [3, 2, 1, 0], [2, 1, 4, 0]][turn // 20]
        labels = rng.integers(0, classes, count)
        logits = rng.normal(size=(len(rivals), count, classes))
        for place, c in enumerate(rivals):
            logits[place, np.arange(count), labels] += quality[c]
            logits[place, :, 0] += 9.0 * (quality[c] == 0)  # one class for all
        evidence = contest.take_in(evidence, torch.from_numpy(logits), rivals)
        plain.see({c: logits[place] for place, c in enumerate(rivals)})
        assert contest.standings(evidence) == pytest.approx(plain.standings(), abs=1e-12)
        decision = contest.decide(contest.standings(evidence), answering)
        assert decision == plain.decide(answering)
        answering, fallen = decision
        for c in fallen:
            evidence[c], plain.rivals[c], fell = 0, plain.new(classes), fell + 1
        seen.add(answering)
    assert len(seen) >= 3
    assert fell > 0


def test_one_image_at_a_time_is_as_a_batch_but_for_the_votes():
    """The averages are exact means as long as fewer images than their horizon came."""
    logits = torch.randn(2, 10, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    contest, start = Contest(recent=20), torch.zeros(2, 9, dtype=torch.float64)
    together, apart = contest.take_in(start, logits, [0, 1]), start
    for image in logits.split(1, dim=1):
        apart = contest.take_in(apart, image, [0, 1])
    torch.testing.assert_close(apart[:, :7], together[:, :7])
    assert torch.equal(apart[:, -1], together[:, -1])


def test_sorted_by_class_is_no_collapse_and_a_collapse_is_one():
    """A right rival on a class-sorted stream keeps its standing; one that says one class for all falls."""
    contest, evidence = Contest(), torch.zeros(3, 23)
    generator = torch.Generator().manual_seed(0)
    for turn in range(40):
        right = 4 * torch.nn.functional.one_hot(torch.full((32,), turn // 2 % 10), 10).float()
        noise = torch.randn(3, 32, 10, generator=generator)
        logits = noise + torch.stack([right / 2, right, 9 * torch.eye(10)[0].expand(32, 10)])
        evidence = contest.take_in(evidence, logits, [0, 1, 2])
    source, right_one, collapsed = contest.standings(evidence)
    assert right_one > source + 0.1
    assert collapsed < source - 0.3


@pytest.mark.parametrize(
    "wrong",
    [{"recent": 0}, {"horizon": 1.5}, {"margin": 3}, {"hysteresis": -0.1}, {"fall": 0}, {"margin": float("nan")}],
)
def test_wrong_options(wrong):
    with pytest.raises(ConfigError, match=rf"{next(iter(wrong))} must be .*; got"):
        Contest(**wrong)
