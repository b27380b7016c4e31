"""FOA: prompt tokens that CMA-ES finds by forward passes alone, and an output that is shifted back to the source."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal, cast

import torch
from torch import Tensor, nn

from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.backbones.tokens import find_tokens, watched_tokens
from lightning_tta.draws import random_words
from lightning_tta.errors import DataError, check_choice, check_range
from lightning_tta.losses import at_least_float32, entropy
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.state import NOT_YET
from lightning_tta.methods.components.running_moments import RunningMoments
from lightning_tta.methods.components.search import Search
from lightning_tta.methods.components.source_images import see_source_images

FULL_UP_TO = 512
"""Dimension up to which ``covariance="auto"`` is ``full``."""
VALUES_IN_A_PASS = 2**25
"""Pixel values in a pass of several candidates, at most: 223 images of 3 x 224 x 224."""
VALUES_ON_CPU = 2**16
"""The same on a CPU, where only passes of few and small images gain by company: 21 images of 3 x 32 x 32."""
BATCH = 64  # for which the authors chose the weight of the discrepancy


class FOA(TTAMethod):
    """Minimises entropy and the distance of activations to the source's over prompt tokens, without any gradient.

    ``prompts`` tokens v, behind the class token, go through all blocks. The fitness of one v on a batch x of B images::

        F(v) = sum_b H(p_b) + discrepancy B / 64 (|mean_b a - mean_s|^2 + |std_b a - std_s|^2)

    p are the predictions with v; a the class token after each block, behind the norm layer of the next one, and the
    head's input z; mean_s and std_s are those of source images without prompts, from :meth:`prepare`. Each batch is a
    generation of :class:`~lightning_tta.methods.components.cma_es.CMAES`: it draws ``population`` prompts, and the best
    one of the batch before is a further candidate. Of the best candidate, v*, with the head g::

        returned:  g(z(v*) + shift (mean_s z - c))           c <- ema c + (1 - ema) mean over candidates and b of z

    c is the one before this batch; there is no shift in the first one. Parameters touched: none. Per batch:
    ``population`` + 1 forward passes (28 where D = 768), no backward pass: it runs on quantised nets too. State: the
    search (mean and two paths, P D numbers each, step size, covariance, generation), v* and c; ``stats`` has the
    fitness of v* and the step size. A candidate whose fitness is not finite ranks last; where all are such, nothing is
    learnt, and v* of before predicts. For a batch of one image the std is a constant, 0.

    :meth:`predict` takes v* and c as they are. v* is, before the first batch, a draw from the uniform distribution in
    ``+- sqrt(6 / (values in a patch + D))``, as of the authors; the search starts at 0.

    Args:
        model: A vision transformer: blocks in a sequence that take tokens (B, N, D), any number N of them, and a layer
            that gives the logits of features. They are found by structure, by a pass through a copy; timm's,
            torchvision's and Hugging Face's ViT, DeiT and DINOv2 are such. Without a class token the prompts stand in
            front, and a is the mean over the other tokens.
        prompts: P, >= 1. Authors: 3.
        population: Candidates drawn for each batch, >= 4; ``None``: 4 + 3 ln(P D), rounded down, 27 where D = 768, as
            the authors have.
        sigma: Step size at the start, > 0. Authors: 1.
        discrepancy: lambda, >= 0. Authors: 0.4 (ImageNet-C), 0.2 (ImageNet-R).
        shift: gamma, >= 0. Authors: 1; 0: none.
        ema: Share of c that stays, in [0, 1]. Authors: 0.9.
        covariance: ``full``, (P D)^2 numbers and their eigenvectors in each batch; ``diagonal`` (sep-CMA-ES); ``auto``:
            full where P D is at most 512. Authors: full, which in 2304 dimensions hardly moves in a stream.
        chunk: Candidates in one pass, >= 1; a limit of memory that changes nothing but rounding. ``None``: so many
            that their images have 2^25 values, on a CPU 2^16, but one at least.
        seed: Of all draws, which are the same on every device.

    Raises:
        UnsupportedModelError: If the net has no such blocks (a convolutional net, a Swin), or they take a fixed number
            of tokens (tables of relative positions, windows); ``output_shift`` and ``neo`` run on these.

    Source: Niu et al., ICML 2024, arXiv 2404.01650; behind which norm layer a is taken is in the authors' code alone.
    Differs from it: draws and CMA-ES are our own, with the further candidate as in the library that they use; from 512
    dimensions on C is diagonal; the std of the source images is that of all of them; what is not finite is left out.
    """

    about = About(
        does="searches prompt tokens by CMA-ES for entropy and the source's activations; shifts the output back",
        learns="prompt tokens",
        passes="28 (by width) / 0",
        needs="a ViT; 32 source images",
        holds="the search",
        suits="shuffled, int8 nets",
        formula="code",
        paper="ICML 2024, arXiv 2404.01650",
    )

    returns = "after the step"
    needs_source = True
    step_on_host = "the eigenvectors of a full covariance wait for the device; a diagonal one has none"
    no_plain_net = (
        "its prompts are tokens beside those of the image, for which a plain net has no place. Deploy the method "
        "itself (method.predict), or use 'output_shift' or 'neo'"
    )
    source_mean: Tensor
    source_std: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        prompts: int = 3,
        population: int | None = None,
        sigma: float = 1.0,
        discrepancy: float = 0.4,
        shift: float = 1.0,
        ema: float = 0.9,
        covariance: Literal["auto", "full", "diagonal"] = "auto",
        chunk: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model)
        check_range("prompts", prompts, 1, integer=True)
        check_range("sigma", sigma, 0, low_open=True)
        check_range("discrepancy", discrepancy, 0)
        check_range("shift", shift, 0)
        check_range("ema", ema, 0, 1)
        check_choice("covariance", covariance, ("auto", "full", "diagonal"))
        for name, value, low in (("population", population, 4), ("chunk", chunk, 1)):
            if value is not None:
                check_range(name, value, low, integer=True)
        check_range("seed", seed, 0, 2**63 - 1, integer=True)
        self.discrepancy, self.shift, self.ema, self.chunk, self.seed = discrepancy, shift, ema, chunk, seed
        self.tokens = find_tokens(self.model, prompts)
        self.prompts, dimension = prompts, prompts * self.tokens.width
        diagonal = covariance == "diagonal" or (covariance == "auto" and dimension > FULL_UP_TO)
        if diagonal:
            self.step_on_host = ""
        like = at_least_float32(next((p for p in self.model.parameters() if p.is_floating_point()), torch.zeros(1)))
        like = torch.zeros(1, dtype=like.dtype, device=like.device)
        population = population or 4 + int(3 * math.log(dimension))
        self.search = Search(self, dimension, population, sigma, like, diagonal=diagonal)
        bound = math.sqrt(6 / (self.tokens.patch_values + self.tokens.width))
        words = random_words(torch.tensor([seed, -1]), dimension)  # generations count from 0
        self.state("best", words.to(like).mul_(bound * 2**-31))
        self.state("center", torch.full_like(like.expand(self.tokens.features), NOT_YET), source=NOT_YET)
        self.keep_wide(*(name for name, tensor in self.rest.items() if tensor.is_floating_point()))  # small steps
        for name in ("source_mean", "source_std"):
            self.register_buffer(name, torch.zeros_like(like.expand(self.tokens.activations)))

    def prepare(self, source_batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Take mean and standard deviation of the activations of source images, without prompts. Authors: 32 suffice.

        Args:
            source_batches: Dicts with ``image`` (B, C, H, W) in [0, 1]; labels are not used.

        Raises:
            DataError: If there are fewer than two images, or an activation is not finite.
        """
        moments = RunningMoments()
        see_source_images(self, source_batches, lambda images: moments.add(self._pass(images)[0][0]))
        if moments.problem:
            raise DataError(
                f"FOA needs mean and standard deviation of the activations of source images; found {moments.problem}. "
                "Give batches {'image': (B, C, H, W) in [0, 1]} of the training set, 32 images or more."
            )
        with outside_inference_mode(), torch.no_grad():
            self.source_mean.copy_(moments.mean)
            self.source_std.copy_(moments.variance.sqrt())
        super().prepare(source_batches)

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """A generation of the search; the logits are those of the best candidate."""
        if not self.step_on_host:
            return self._generation(x, *self.search.roots_now(self))
        return cast(Tensor, self.replayed("generation", self._generation, x, *self.search.roots_now(self)))

    @torch.no_grad()
    def infer(self, x: Tensor) -> Tensor:
        """With the best prompt and the center as they are."""
        activations, _ = self._pass(x, self.value("best")[None])
        return self._shifted(activations[0])

    def _generation(self, x: Tensor, root: Tensor, inverse: Tensor) -> Tensor:
        points = self.search.candidates(self, root, self.seed, self.value("best"))
        size = self.chunk or max(1, (VALUES_ON_CPU if x.device.type == "cpu" else VALUES_IN_A_PASS) // x.numel())
        parts = [self._valued(x, part) for part in torch.split(points, size)]
        fitness, features = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        finite = torch.isfinite(fitness)
        any_finite = finite.any()
        self.count("skipped_steps", ~any_finite)
        ranked = torch.where(finite, fitness, torch.inf)
        number = torch.where(any_finite, ranked.argmin(), len(points) - 1)[None]
        logits = self._shifted(features.index_select(0, number)[0])
        with torch.autocast(x.device.type, enabled=False):
            self.search.learn(self, (root, inverse), points, fitness, any_finite)
            self.write("best", points.index_select(0, number)[0], any_finite)
            center = self.value("center")
            here = torch.where(finite[:, None], features.to(center).mean(1), 0).sum(0) / finite.sum()
            here = torch.where(center.isnan(), here, self.ema * center + (1 - self.ema) * here)
            self.write("center", here, any_finite)
        self.note(fitness=ranked.amin(), step_size=self.value("search.sigma").clone())
        return logits

    def _valued(self, x: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """Fitness (c,) and features (c, B, Z) of candidates (c, P D)."""
        activations, logits = self._pass(x, points)
        here = at_least_float32(activations).to(self.source_mean)
        mean = here.mean(1)
        std = ((here - mean[:, None]).square().sum(1) / max(len(x) - 1, 1)).sqrt()
        apart = (mean - self.source_mean).square().sum(1) + (std - self.source_std).square().sum(1)
        fitness = entropy(logits).sum(1) + self.discrepancy * len(x) / BATCH * apart
        return fitness, activations[..., -self.tokens.features :]

    def _pass(self, x: Tensor, points: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Activations (c, B, A) and logits (c, B, K) of images with each of c prompts; ``None``: without."""
        number = 1 if points is None else len(points)
        tokens = points
        if tokens is not None:
            tokens = tokens.view(number, self.prompts, self.tokens.width).repeat_interleave(len(x), 0)
        with watched_tokens(self.model, self.tokens, tokens) as seen:
            logits = self.logits(x.repeat(number, 1, 1, 1))
        self.count("forwards", number - 1)
        return seen.activations.view(number, len(x), -1), logits.view(number, len(x), -1)

    def _shifted(self, activations: Tensor) -> Tensor:
        """Logits (B, K) of features, the last of the activations (B, A), shifted to where the source's are."""
        features = activations[:, -self.tokens.features :]
        center = self.value("center")
        away = torch.where(center.isnan(), 0, self.source_mean[-self.tokens.features :].to(center) - center)
        head = self.model.get_submodule(self.tokens.head)
        return cast(Tensor, head(features + (self.shift * away).to(features)))
