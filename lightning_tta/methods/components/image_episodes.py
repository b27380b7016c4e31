"""Episodes: steps for one image on the net itself, or for several at once, each with norm parameters of its own."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from lightning_tta.errors import ConfigError
from lightning_tta.methods.base.gradient import GradientMethod, Gradients, total_norm
from lightning_tta.methods.base.optimizers import masked_step
from lightning_tta.methods.components.episodes import ViewMethod, made_again, per_image
from lightning_tta.views.augmix import make_views

_VIEWS_AT_ONCE = 128


class EpisodeMethod(ViewMethod, GradientMethod):
    """Takes each image of a batch as an episode: steps on its views, its prediction after them, everything back.

    To write one: call :meth:`learn_rows` in the constructor, and implement :meth:`image_loss`.

    Attributes:
        episode_steps: Steps for each image.
        fresh: Whether the optimizer forgets between images.
        can_together: Whether several images can be taken at once.
        together: Whether they are; ``None``: on an accelerator.
    """

    returns = "after the step"
    episode_steps: int = 1
    fresh: bool = True

    @abstractmethod
    def image_loss(self, logits: Tensor) -> Tensor:
        """The loss of each image, (S,), from the logits of its views (S, V, K)."""

    def learn_rows(self, params: str, together: bool | None) -> None:
        """Declare what learns, ``all`` or ``norm``, and how images are taken.

        Raises:
            ConfigError: If ``together`` is true where that is not possible.
        """
        named = self.select(params)
        self.learn(named)
        self._names = list(named)
        is_chosen = self.choice is not None  # other parameters have no rows of their own for each image
        split = self.chunk_views is not None and self.chunk_views < self.views
        self.can_together = params == "norm" and not is_chosen and self.fresh and not split and self.runs_per_image
        if together and not self.can_together:
            raise ConfigError(
                "together=True needs params='norm' without select=, optimizer_state='fresh', chunk_views of at least "
                "views, and norm layers of torch's own kinds without fused activations. Use together=None."
            )
        self.together = together

    def step(self, x: Tensor) -> Tensor:
        """An episode for each image; several at once where that is the same and fits."""
        together = (x.device.type != "cpu" if self.together is None else self.together) and self.can_together
        run, kind = (self.pass_of_rows, "rows") if together else (self.logits, "net")
        fitted = self.fitted(x)
        images, self._views_at_once = self.fitting(fitted, run, kind, self.views)
        if x.device.type == "cpu" and not together:  # what goes through the net in turn stays in the caches
            images = min(images, max(1, _VIEWS_AT_ONCE // self.views))
        seeds, parts = self.seeds(x), []
        for first in range(0, len(x), images):  # views of several images are made at once, which is faster
            chunk = fitted[first : first + images]
            views = make_views(x[first : first + images], self.views, self.augment, seeds[first : first + images])
            views = self.fitted(views)
            if together and self._views_at_once == self.views:
                parts.append(self.replayed("episodes", self._episodes, chunk, views))
            else:
                pairs = zip(chunk, views, strict=True)
                parts += [self.replayed("episode", self._episode, one[None], its_views) for one, its_views in pairs]
        logits, losses = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        self.note(loss=losses.mean())
        return self.allowed(logits)

    def _rows(self, images: int) -> tuple[list[Tensor], list[Tensor]]:
        """A row for each image of what is learned: as tensors (S, N), one a dtype; by parameter, (S, ...), in them."""
        flat: list[Tensor] = []
        rows: dict[int, Tensor] = {}
        for dtype in dict.fromkeys(p.dtype for p in self.learned):
            group = {i: p.detach() for i, p in enumerate(self.learned) if p.dtype == dtype}
            flat.append(torch.cat([p.flatten() for p in group.values()]).expand(images, -1).clone())
            pieces = torch.split(flat[-1], [p.numel() for p in group.values()], 1)
            for (index, p), piece in zip(group.items(), pieces, strict=True):
                rows[index] = piece.view(images, *p.shape).requires_grad_()
        return flat, [rows[index] for index in range(len(rows))]

    def _with_rows(self, rows: list[Tensor]) -> AbstractContextManager[None]:
        return per_image(self.model, len(rows[0]), dict(zip(self._names, rows, strict=True)), self.bn_prior)

    def pass_of_rows(self, samples: Tensor) -> Tensor:
        """A pass of one image's views, as it is where several images go through the net together."""
        with self._with_rows(self._rows(1)[1]):
            return self.logits(samples)

    def _episodes(self, images: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        """Several images at once: each has its own row of scales and shifts, the rest of the net is shared.

        Images (S, C, H, W) and their views (S, V, C, H, W); logits (S, K) and the last step's losses (S,).
        """
        count, samples = len(images), views.flatten(0, 1)
        flat, rows = self._rows(count)
        source = [tensor[:1].clone() for tensor in flat]
        optimizer = self.new_optimizer(flat)
        good = torch.ones(count, dtype=torch.bool, device=images.device)
        for _ in range(self.episode_steps):
            with self._with_rows(rows):
                losses = self.image_loss(self.logits(samples).view(count, self.views, -1))
                gradients = self.differentiate(losses.sum(), rows)
            losses, before = losses.detach(), good
            values = [torch.zeros_like(r) if g is None else g for r, g in zip(rows, gradients, strict=True)]
            steps = [torch.cat([v.flatten(1) for v in values if v.dtype == tensor.dtype], 1) for tensor in flat]
            for finite in (losses.isfinite(), *(step.isfinite().all(1) for step in steps)):
                good = good & finite
            self.count("backwards")
            self.count("skipped_steps", (before & ~good).sum())
            masked_step(optimizer, steps, torch.ones((), dtype=torch.bool, device=images.device))
            with torch.no_grad():
                for row, p, gradient in zip(rows, self.learned, gradients, strict=True):
                    if gradient is None:  # weight decay is for what learns
                        row.copy_(p)
        with torch.no_grad(), self._with_rows(rows):
            for tensor, value in zip(flat, source, strict=True):
                tensor.copy_(torch.where(good[:, None], tensor, value))
            return self.logits(images), losses

    def _episode(self, image: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        """One image (1, C, H, W) with its views (V, C, H, W), on the net itself; logits (1, K), last step's loss (1,).

        The weights are the source's before and after; a step that is not finite leaves them there for all that follow.
        """
        if self.fresh:
            self.forget_moments()
        good = torch.ones((), dtype=torch.bool, device=image.device)
        try:
            for _ in range(self.episode_steps):
                with self.source_statistics():  # for the backward pass too, which may compute layers again
                    losses = self.image_loss(self._logits_of_views(views)[None])
                    gradients = self.differentiate(losses.sum())
                losses = losses.detach()
                norm = total_norm([g for g in gradients if g is not None])
                finite = norm.isfinite() & losses.isfinite().all()
                self.count("backwards")
                self.count("skipped_steps", good & ~finite)
                good = good & finite
                if self.known(~good):
                    break
                self.apply_gradients(Gradients(gradients, losses[0], good, norm))
            if self.episode_steps > 1 and not self.known(good):
                self._restore(~good)
            with torch.no_grad(), self.source_statistics():
                return self.logits(image), losses
        finally:
            self._restore()
            if self.fresh:
                self.forget_moments()

    @torch.no_grad()
    def _restore(self, where: Tensor | None = None) -> None:
        tensors = [tensor.detach() for tensor in self.learned]
        sources = [self.source_value(f"model.{name}") for name in self._names]
        if where is not None:
            sources = [torch.where(where, source, t) for source, t in zip(sources, tensors, strict=True)]
        torch._foreach_copy_(tensors, sources)

    def _logits_of_views(self, views: Tensor) -> Tensor:
        """Logits (V, K); of views in chunks, one chunk's activations are kept at a time, and made again backwards."""
        if self._views_at_once >= self.views:
            return self.logits(views)
        chunks = torch.split(views, self._views_at_once)
        return torch.cat([made_again(self.logits, chunk) for chunk in chunks])
