"""Label shift adapter: a small net turns the labels' distribution into a change of features and classifier."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_tta import collective
from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.backbones.split import HeadSplit
from lightning_tta.draws import random_integers, random_normals, random_orders
from lightning_tta.errors import UnsupportedModelError, check_choice, check_range
from lightning_tta.losses import at_least_float32, entropy
from lightning_tta.methods.base.description import About
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.components.projector import make_projector
from lightning_tta.methods.components.source_features import check_classes, labelled_features
from lightning_tta.methods.components.source_images import see_source_images
from lightning_tta.methods.components.source_training import training

Priors = Literal["random", "three"]
BATCH = 64
LEAST = 1e-3
"""Of a class's share times K, for its logarithm."""


class LabelShiftAdapter(TTAMethod):
    """Predicts with a classifier that a small net sets for the distribution of labels that the stream seems to have.

    With features z, classifier W, b, and distribution pi, the adapter a, Linear, ReLU, Linear, gives ::

        (gamma - 1, beta, q - 1 / sqrt(D), p, b') = a(log(K pi)),     all 0 at its start
        u = (W + p q') (gamma * z + beta) + b + b'

    :meth:`prepare` trains a on labelled source features, for distributions pi that are drawn, so that u is right where
    the labels have pi: it minimises the generalised logit-adjusted loss ``CE(u + log pi_s - log pi, y)``, pi_s the
    source's. In the stream ``pi <- momentum * pi + (1 - momentum) * mean_b softmax(u_b)``, from pi_s on.

    Parameters touched: none; nothing of the net learns. BatchNorm has its source statistics, or others by
    ``statistics=``. State: pi, K floats; saved with it a and pi_s. Per batch one forward pass. Returns the logits with
    the batch in pi. ``stats["prior_entropy"]`` is that of pi, in shares of ln K.

    Try ``prior="em"`` first, an option of every method: it needs no training, and is exact where the labels alone
    shift.

    Args:
        model: A classifier that ends in a linear layer with a bias.
        momentum: Of pi, in [0, 1]; 0.9, not verified.
        hidden: Width of a, >= 1; 64, the paper's is not published.
        priors: Distributions that are drawn. ``three``: pi_s, the uniform one, and that in proportion to 1 / pi_s, as
            in the paper, whose sources are long-tailed; of a balanced source all three are one, and a learns nothing.
            ``random``, our addition: with equal chances one of these or a random one.
        epochs: Passes over the source features, >= 1.
        train_lr: Rate of AdamW meanwhile, >= 0.
        head: Name of the last linear layer where the search finds another.
        seed: Of a's start, and of the draws.

    Raises:
        UnsupportedModelError: If the net does not end in a linear layer with a bias.

    Source: Park et al., ICCV 2023, arXiv 2308.08810; no public code. Reconstruction from a digest: what a takes in and
    puts out, the loss and the three distributions are the paper's; widths, rates, the change of W by one outer product
    (the whole of it would be K D numbers), the logarithm, and pi by predictions in the mean are ours. The paper adds it
    to methods that learn; this one stands alone.
    """

    about = About(
        does="a small net, trained on source features, sets the classifier for the labels' distribution",
        learns="none",
        passes="1 / 0",
        needs="linear head, 2,000 labelled source images",
        holds="a small net, K floats",
        suits="labels that shift slowly",
        formula="reconstruction",
        paper="ICCV 2023, arXiv 2308.08810",
    )

    returns = "after the step"
    synchronized = True
    needs_source = True

    def __init__(
        self,
        model: nn.Module,
        *,
        momentum: float = 0.9,
        hidden: int = 64,
        priors: Priors = "random",
        epochs: int = 20,
        train_lr: float = 1e-3,
        head: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model)
        check_range("momentum", momentum, 0, 1)
        check_range("hidden", hidden, 1, integer=True)
        check_choice("priors", priors, ("random", "three"))
        check_range("epochs", epochs, 1, integer=True)
        check_range("train_lr", train_lr, 0)
        check_range("seed", seed, 0, 2**63 - 1, integer=True)
        self.momentum, self.priors, self.epochs, self.train_lr, self.seed = momentum, priors, epochs, train_lr, seed
        self.split = HeadSplit(self.model, head)
        if (layer := self.split.head).bias is None:
            raise UnsupportedModelError(
                f"The last linear layer '{self.split.name}' of {type(self.model).__name__} has no bias to adapt. Give "
                "it one, of zeros; or use prior='em', with any method."
            )
        classes, width = self.split.num_classes, self.split.num_features
        self._sizes = [width, width, width, classes, classes]
        like = at_least_float32(layer.weight.detach())
        self.adapter = make_projector(classes, hidden, sum(self._sizes), seed=seed, like=like)
        with torch.no_grad():
            for parameter in self.adapter[2].parameters():
                parameter.zero_()
        self.prior = self.state("prior", torch.full((classes,), 1 / classes).to(like))
        self.keep_wide("prior")

    def prepare(self, source_batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Train the adapter on source features; the labels' distribution is taken from them.

        Args:
            source_batches: Dicts with ``image`` (B, C, H, W) in [0, 1] and ``label`` (B,).

        Raises:
            ConfigError: If the method is prepared already.
            DataError: If there is no image with finite features, a label is missing or no class of the net, or the
                adapter ends in values that are not finite.
        """
        self.check_not_prepared()
        found: list[tuple[Tensor, Tensor]] = []
        classes = self.split.num_classes

        @torch.no_grad()
        def see(images: Tensor, labels: Tensor) -> None:
            found.append(labelled_features(self, images, labels))

        with self.at_source():
            see_source_images(self, source_batches, see, classes=classes, running=nullcontext)
        counts = torch.zeros(classes, dtype=torch.float64)
        for _, labels in found:
            counts += torch.bincount(labels, minlength=classes).cpu()
        check_classes(self, counts)
        with outside_inference_mode():
            source = ((counts + 1) / (counts + 1).sum()).to(self.prior)
            self._train(source, *(torch.cat(column).clone() for column in zip(*found, strict=True)))
            self.write("prior", source)
            self.renew_source("prior")
        super().prepare(source_batches)

    def _train(self, source: Tensor, features: Tensor, labels: Tensor) -> None:
        counter = 0
        with training(self.adapter, self.train_lr, self.name) as descend:
            for epoch in range(self.epochs):
                key = torch.tensor([self.seed, -1 - epoch], device=features.device)
                for chosen in torch.split(random_orders(key, 1, len(features))[0], BATCH):
                    counter += 1
                    prior = self.draw_prior(source, torch.tensor([self.seed, counter], device=features.device))
                    weight, bias = self.classifier(prior)
                    logits = features[chosen].to(weight) @ weight.T + bias
                    descend(cross_entropy(logits + source.log() - prior.log(), labels[chosen]))

    def draw_prior(self, source: Tensor, key: Tensor) -> Tensor:
        """A distribution (K,) to train for, drawn by a key."""
        choices = [source, torch.full_like(source, 1 / len(source)), (1 / source) / (1 / source).sum()]
        if self.priors == "random":
            choices.append((2 * random_normals(key + 1, len(source)).to(source)).softmax(0))
        return torch.stack(choices)[random_integers(key, 1)[0] % len(choices)]

    def classifier(self, prior: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of the linear layer that predicts for a distribution of labels."""
        layer = self.split.head
        weight, bias = (at_least_float32(tensor.detach()) for tensor in (layer.weight, layer.bias))
        inputs = (prior * len(prior)).clamp_min(LEAST).log().to(next(self.adapter.parameters()))
        gain, beta, across, down, more = self.adapter(inputs).to(weight).split(self._sizes)
        moved = weight + torch.outer(down, across + len(across) ** -0.5)
        return moved * (1 + gain), moved @ beta + bias + more

    def step(self, x: Tensor) -> Tensor:
        """Take the batch into pi, and predict for it."""
        features, _ = self.features(x)
        z = at_least_float32(features.detach())
        with torch.no_grad():
            weight, bias = self.classifier(self.value("prior"))
            mean = collective.mean((z @ weight.T + bias).softmax(1))
            new = torch.lerp(mean.to(self.value("prior")), self.value("prior"), self.momentum)
            finite = new.isfinite().all()
            self.count("skipped_steps", ~finite)
            self.write("prior", new, finite)
            weight, bias = self.classifier(self.value("prior"))
            prior = self.value("prior")
            self.note(prior_entropy=entropy(prior.clamp_min(1e-30).log()) / math.log(len(prior)))
        return z @ weight.T + bias

    def stream_weights(self) -> dict[str, Tensor]:
        """The classifier's, for pi as it is now."""
        with torch.no_grad():
            weight, bias = self.classifier(self.value("prior"))
        return {f"{self.split.name}.weight": weight, f"{self.split.name}.bias": bias}

    def infer(self, x: Tensor) -> Tensor:
        """The net with the classifier for pi as it is now."""
        return self.logits(x, self.stream_weights(), accounted=True)
