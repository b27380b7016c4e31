"""Auto: several methods on the same stream, and a rule without labels for which of them answers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lightning_tta.errors import ConfigError, check_range
from lightning_tta.evidence.contest import Contest
from lightning_tta.losses import at_least_float32
from lightning_tta.methods import adapt
from lightning_tta.methods.base.correction import Correction
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.memory import DomainMemory
from lightning_tta.methods.base.method import PredictWith, TTAMethod
from lightning_tta.methods.base.state import NOT_YET
from lightning_tta.methods.components.candidates import has_strayed, make_candidates
from lightning_tta.methods.components.wanted import Wanted

EVIDENCE, TURN, RESTING = "evidence", "turn", "resting"


class Auto(TTAMethod):
    """Minimises nothing itself: runs candidate methods side by side, and answers with the one that evidence favours.

    Each candidate is a method on a copy of the net; number 0 is the source net itself, which answers first. Every
    ``every`` batches all of them, the source too, get the batch (a probe); the one that answers gets all batches. From
    the probes :class:`~lightning_tta.evidence.contest.Contest` makes a standing of each::

        standing = max(H(m_recent), H(m_long)) - mean H(p) - dissent

    with H over log K: the mutual information of image and class, less the share of predictions that the others outvote.
    Another one answers, from the probe's own batch on, if it is better by more than ``hysteresis``; the source counts
    ``margin`` more than it has. **Alarm**: a candidate is reset to the source, and rests for ``rest`` probes, if it is
    ``fall`` below the source, if its logits are not finite where the source's are, or if its parameters are farther
    from the source than those are long; if it has answered, the source answers again. So a candidate that collapses, or
    that suits the stream no longer, begins anew later.

    Touched: what the candidates touch, each in its own copy. State: theirs, and 2 K + 3 numbers for each. ``stats`` has
    ``answers``, the number of who answered; ``lead``, its standing less the source's; ``fallen``, how many fell in this
    batch; what the answering candidate notes; and in ``forwards`` and ``backwards`` the passes of all of them.
    ``export()`` gives the plain net of the present one, or says why there is none.

    Args:
        model: A classifier.
        candidates: Names of methods, or dicts of ``method`` and options of :func:`lightning_tta.adapt`, such as
            ``{"method": "tent", "lr": 1e-3, "statistics": "auto"}``; the source is always there. ``default``: ZeroSiam;
            ZeroSiam with ``prior="markov"``; the source with that and ``refine="lame"``; with BatchNorm the latter two
            with ``statistics="auto"``; without norm layers T3A and LAME in the place of ZeroSiam.
        every: Batches from probe to probe, >= 1. 1 follows soonest; the higher, the cheaper.
        margin: What a candidate must be better by than the source, in standings, which are at most 1; below
            0 a worse one answers, too. In [-2, 2].
        hysteresis: What it must be better by than who answers, beside that; >= 0.
        fall: How far below the source is fallen, > 0.
        recent: Images, of the probes, that the evidence is of; a quarter of it are needed to judge. >= 1.
        horizon: Images that the long mean prediction is of, >= 1; a stream sorted by class should show most classes.
        rest: Probes that a fallen candidate leaves out, >= 0.

    Raises:
        ConfigError: If a candidate or a value is none of those allowed.
        UnsupportedModelError: If a candidate cannot run on the net; of the default ones, if none can.

    Own work, without a paper. It compares methods, and estimates no accuracy. Candidates that are wrong in the same way
    do not outvote each other, so name different ones. A method can gain information by growing sure without being
    right; only the votes of the others, and the alarm, bound that. AETTA's estimate is no part of the evidence: it
    takes the entropy of the batch's mean prediction for a sign of collapse, which a stream sorted by class lowers, too.
    """

    about = About(
        does="nothing itself: runs methods side by side, answers with the one that evidence without labels favors",
        learns="what its candidates learn",
        passes="of its candidates",
        needs="what they need",
        holds="a net for each candidate",
        suits="unknown, or changing",
        formula="own work",
        paper="none",
    )

    step_on_host = "it compares methods and moves to another one"
    joins_images = True  # a candidate may
    own_statistics = "its candidates have theirs: candidates=[{'method': 'zerosiam', 'statistics': 'auto'}]"
    own_prior = "its candidates have theirs: candidates=[{'method': 'zerosiam', 'prior': 'markov'}]"

    def __init__(
        self,
        model: nn.Module,
        *,
        candidates: Wanted | Sequence[Wanted] = "default",
        every: int = 2,
        margin: float = 0.05,
        hysteresis: float = 0.03,
        fall: float = 0.3,
        recent: int = 128,
        horizon: int = 1024,
        rest: int = 8,
    ) -> None:
        check_range("every", every, 1, integer=True)
        check_range("rest", rest, 0, integer=True)
        contest = Contest(recent, horizon, margin, hysteresis, fall)
        made = make_candidates(model, candidates, adapt)
        self.needs_source = any(method.needs_source for _, method in made)
        super().__init__(model)
        self.every, self.rest_probes, self.contest = every, rest, contest
        self.names = ["source", *(name for name, _ in made)]
        for number, (_, method) in enumerate(made, 1):
            self.nest(f"candidate{number}", method)
            method.task, method.told_of_batches = self.task, True  # warnings of this one are enough
        like = next(iter(self.model.parameters()), torch.zeros(()))
        counters = torch.zeros(len(self.names), dtype=torch.int64, device=like.device)
        self.state(EVIDENCE, like.new_full((len(self.names), 0), NOT_YET, dtype=torch.float32), source=NOT_YET)
        self.keep_wide(EVIDENCE)
        self.state(TURN, counters[:2].clone(), source=0)  # who answers, and batches so far
        self.state(RESTING, counters, source=0)  # probes to leave out

    @property
    def answering(self) -> str:
        """Name of the method that answers now, with its options; ``source``: the net as it was. Asks the device."""
        return self.names[self._turn()[0]]

    def prepare(self, source_batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Show source data to each candidate that needs it."""
        needing = [method for method in map(self.candidate, range(1, len(self.names))) if method.needs_source]
        batches = list(source_batches) if hasattr(source_batches, "__next__") and len(needing) > 1 else source_batches
        for method in needing:
            method.prepare(batches)
        super().prepare(batches)

    def candidate(self, number: int) -> TTAMethod:
        """The method of this number, from 1."""
        return cast(TTAMethod, self.get_submodule(f"candidate{number}"))

    def step(self, x: Tensor) -> Tensor:
        """A probe, or a step of the one that answers."""
        answering, batches = self._turn()
        probes, logits = batches % self.every == 0, dict[int, Tensor]()
        if not probes:
            logits[answering] = self._run(answering, x)
            probes = not _finite(logits[answering])
        if probes:
            awake = [number for number, pause in enumerate(self.value(RESTING).tolist()) if pause == 0]
            logits = {number: logits[number] if number in logits else self._run(number, x) for number in awake}
            if not _finite(logits[0]):
                return logits[answering]  # the batch says nothing, and leaves no trace
        broken = [number for number, values in logits.items() if not _finite(values)]
        stepped = [number for number in logits if number and not self._skipped(number)]
        if not stepped and not broken and logits.keys() - {0}:
            return logits[answering]  # nor does one on which no candidate could step
        if probes:
            good = {number: logits[number] for number in (0, *stepped) if number not in broken}
            answering = self._judge(good, broken, answering)
        self.write(TURN, torch.tensor([answering, batches + 1]))
        if answering:
            self.note(**self.candidate(answering).scalars[0])
        self.note(answers=self.value(TURN)[0].clone())
        return logits[answering]

    def _run(self, number: int, x: Tensor) -> Tensor:
        """Logits of a candidate that steps on the batch; its passes are counted."""
        if number == 0:
            source: Tensor = self.replayed("source", torch.no_grad()(self.logits), x)
            return source
        method = self.candidate(number)
        method.execution = self.execution
        logits: Tensor = method(x)
        for name in ("forwards", "backwards", "skipped_steps"):
            self.count(name, method.scalars[1][name])
        return logits

    def _skipped(self, number: int) -> bool:
        return bool(self.candidate(number).scalars[1]["skipped_steps"])

    @torch.no_grad()
    def _judge(self, logits: Mapping[int, Tensor], broken: Collection[int], answering: int) -> int:
        """Take in a probe; resets who has fallen, and says who answers."""
        stacked = torch.stack([at_least_float32(values) for values in logits.values()])
        evidence = self.sized(EVIDENCE, stacked.new_empty(len(self.names), 2 * stacked.shape[-1] + 3)).nan_to_num(0)
        evidence = self.contest.take_in(evidence, stacked, list(logits))
        standings = self.contest.standings(evidence)
        answering, fallen = self.contest.decide(standings, answering)
        strayed = [number for number in logits if number and has_strayed(self.candidate(number))]
        fallen = sorted({*fallen, *broken, *strayed})
        resting = (self.value(RESTING) - 1).clamp(min=0)
        for number in fallen:
            self.candidate(number).reset()
            evidence[number], resting[number] = 0, self.rest_probes
        self.write(EVIDENCE, evidence)
        self.write(RESTING, resting)
        answering = 0 if answering in fallen else answering
        self.note(
            lead=evidence.new_tensor(standings[answering] - standings[0]), fallen=evidence.new_tensor(len(fallen))
        )
        return answering

    def infer(self, x: Tensor) -> Tensor:
        """As the one that answers predicts, with the statistics of the batch where it takes those."""
        return self._predict(x, "batch")

    def infer_plain(self, x: Tensor) -> Tensor:
        """As the one that answers predicts each image apart."""
        return self._predict(x, "stream")

    def _predict(self, x: Tensor, statistics: PredictWith) -> Tensor:
        answering = self._turn()[0]
        return self.candidate(answering).predict(x, statistics=statistics) if answering else self.logits(x)

    def export(self) -> nn.Module:
        """The plain net of the one that answers; raises what its method raises."""
        answering = self._turn()[0]
        return self.candidate(answering).export() if answering else super().export()

    def capture_report(self) -> dict[str, str]:
        """Of all candidates; the comparison itself is not captured."""
        reports = {name: self.candidate(number).capture_report() for number, name in enumerate(self.names) if number}
        return {f"{name}: {part}": said for name, report in reports.items() for part, said in report.items()}

    def put_on(self, correction: Correction) -> None:
        """Refused: see :attr:`own_prior`."""
        raise ConfigError(f"'{self.name}' corrects nothing itself: {self.own_prior}. Leave it out here.")

    def remember(self, memory: DomainMemory) -> None:
        """Refused: a candidate may have a memory."""
        raise ConfigError("Candidates may have one each: candidates=[{'method': 'tent', 'reservoir': {...}}].")

    def _turn(self) -> tuple[int, int]:
        answering, batches = self.value(TURN).tolist()
        return int(answering), int(batches)


def _finite(logits: Tensor) -> bool:
    return bool(torch.isfinite(logits).all())
