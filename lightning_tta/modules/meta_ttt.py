"""Meta-training: a source model that learns to adapt."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_tta.backbones import Backbone
from lightning_tta.backbones.split import find_head
from lightning_tta.errors import ConfigError, check_choice, check_range
from lightning_tta.meta.inner_loop import InnerLoop, InnerParameters, Phase, adapt_inner, alignment
from lightning_tta.meta.mixed_bn import Parametrization, convert_mixed_bn, mixed_batch_norm_layers
from lightning_tta.meta.synthesis import DomainShiftSynthesis
from lightning_tta.methods.base.execution import Capture
from lightning_tta.modules.classes import check_class_counts, check_labels, class_names_of
from lightning_tta.modules.loading import describe_net, load_source
from lightning_tta.modules.recorded_loss import RecordedLoss
from lightning_tta.modules.source_module import log_mean
from lightning_tta.modules.training import TrainingRecord

Schedule = Literal["alternating", "chained"]


class MetaTTT(LightningModule):
    """Minimises the cross-entropy of the net *after* it has adapted to the batch without labels.

    Inner loop (:func:`lightning_tta.meta.inner_loop.adapt_inner`): steps of plain gradient descent on the unsupervised
    max and min losses, on a functional copy of the norm layers' parameters. Outer step: the cross-entropy of the
    adapted net on the same batch, differentiated through the inner steps (second order), into all parameters:
    convolutions, scales, shifts, mixing weights, head. The source statistics of BatchNorm stay fixed and the net stays
    in eval mode. Logs under ``meta/``: ``train_loss`` (outer), ``inner_max_loss``, ``inner_min_loss``, ``alignment``
    (cosine between the inner gradient and that of the cross-entropy, both before the first step), ``val_before`` and
    ``val_after`` (accuracy without and with adaptation), ``source_weight`` (mean, lowest, highest, and a histogram).

    Batches are ``{image (B, C, H, W) in [0, 1], label (B,)}``; with several source domains also ``domain`` (B,), one
    domain after the other in equal numbers, as the data modules make them. Validation batches are adapted to as they
    come, max steps and then min steps: let them be shifted, one shift a batch (``val_domains`` of the data modules).

    Args:
        source_ckpt: Where training starts: see :class:`~lightning_tta.TestTimeAdaptation`.
        backbone: Name of the net, where the weights do not say it.
        num_classes: Number of classes of ``backbone``.
        pretrained: Start from the library's pretrained weights (downloads them).
        backbone_options: Further arguments of the backbone.
        schedule: ``alternating``: one outer step through the max steps, the next through the min steps, and so on.
            ``chained``: each through the max steps and then the min steps, as at test time.
        second_order: ``False``: the inner gradients count as constants (first order).
        meta: ``False``: plain cross-entropy of the mixed net, no inner loop: what the same training does without it.
        learn_inner_lr: Learn the rates (their logarithms) too; a rate of 0 stays 0.
        source_weight: Initial weight on the source statistics.
        source_weight_std: Spread of the initial weights.
        source_weight_kind: ``raw`` or ``sigmoid``: see :class:`~lightning_tta.meta.mixed_bn.MixedBatchNorm`.
        learn_source_weight: Whether the outer step learns the mixing weights.
        synthesis_probability: See :class:`~lightning_tta.meta.synthesis.DomainShiftSynthesis`; 0 for none.
        pseudo_domains: Each domain of a batch is split into this many, each with a synthesised shift of its own and
            adapted to on its own.
        head_lr_factor: The head's learning rate over that of the rest; the authors take 10.
        optimizer: Called with the parameters. Default: SGD, lr 1e-3, Nesterov momentum 0.9, weight decay 5e-4.
        lr_scheduler: Called with the optimizer; stepped per epoch.
        capture: Whether outer steps are recorded as a CUDA graph, one a shape, and replayed: ``auto``: on CUDA with one
            process; ``True``: refuse to train where that is not possible; ``False``: never. See
            :class:`~lightning_tta.modules.recorded_loss.RecordedLoss`.
        inner: Settings of :class:`~lightning_tta.meta.inner_loop.InnerLoop` by name, such as ``max_lr=0.3``.

    Raises:
        ConfigError: If a value is out of range, or the Trainer asks for what cannot be differentiated twice.
        UnsupportedModelError: If the net has no BatchNorm layers.

    Source: Meta-TTT, arXiv 2410.01709, and the authors' code. Differs from them: the losses of several domains are
    averaged, not summed (so that processes can share them out; multiply the rate by their number to get theirs);
    the two updates of the alternating schedule take batches of their own, so that the Trainer's options apply to both.
    """

    def __init__(
        self,
        source_ckpt: str | None = None,
        backbone: str | nn.Module | None = None,
        num_classes: int | None = None,
        pretrained: bool = False,
        backbone_options: dict[str, Any] | None = None,
        schedule: Schedule = "alternating",
        second_order: bool = True,
        meta: bool = True,
        learn_inner_lr: bool = False,
        source_weight: float = 0.75,
        source_weight_std: float = 0.01,
        source_weight_kind: Parametrization = "raw",
        learn_source_weight: bool = True,
        synthesis_probability: float = 0.03,
        pseudo_domains: int = 1,
        head_lr_factor: float = 10.0,
        optimizer: OptimizerCallable = lambda p: torch.optim.SGD(
            p, lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4
        ),
        lr_scheduler: LRSchedulerCallable | None = None,
        capture: Capture = "auto",
        **inner: Any,
    ) -> None:
        super().__init__()
        check_choice("schedule", schedule, ("alternating", "chained"))
        check_range("synthesis_probability", synthesis_probability, 0, 1)
        check_range("pseudo_domains", pseudo_domains, 1, integer=True)
        check_range("head_lr_factor", head_lr_factor, 0)
        self.settings = InnerLoop(**inner)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", "backbone", "capture"])
        net = load_source(source_ckpt, backbone, num_classes, pretrained, backbone_options)
        self.backbone = convert_mixed_bn(net, source_weight, source_weight_std, source_weight_kind)
        self.backbone.requires_grad_(True)
        for layer in mixed_batch_norm_layers(self.backbone).values():
            layer.source_weight.requires_grad_(learn_source_weight)
        self.inner_parameters = InnerParameters(self.backbone, self.settings)
        self.schedule, self.second_order, self.meta = schedule, second_order, meta
        self.pseudo_domains, self.head_lr_factor = pseudo_domains, head_lr_factor
        self.synthesis = DomainShiftSynthesis(self.backbone, synthesis_probability) if synthesis_probability else None
        self.log_rates = nn.ParameterDict()
        if learn_inner_lr and meta:
            rates = {kind: rate for kind, rate in self.settings.rates.items() if rate > 0}
            self.log_rates.update({kind: nn.Parameter(torch.tensor(rate).log()) for kind, rate in rates.items()})
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.recorded = RecordedLoss(capture)

    @property
    def rates(self) -> dict[str, Tensor | float]:
        """The inner learning rates, learned or given."""
        return {**self.settings.rates, **{kind: log.exp() for kind, log in self.log_rates.items()}}

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W) in [0, 1], without adaptation."""
        logits: Tensor = self.backbone(images)
        return logits

    def configure_callbacks(self) -> list[Callback]:
        """What marks a finished training."""
        return [TrainingRecord()]

    def train(self, mode: bool = True) -> MetaTTT:
        """Record ``mode``; the net stays in eval mode, so that its passes see the same net."""
        super().train(mode)
        self.backbone.eval()
        return self

    def setup(self, stage: str) -> None:
        """Refuse ``sync_batchnorm`` and a compiled module, which cannot be differentiated twice, and wrong classes."""
        if isinstance(self.backbone, Backbone):
            names = class_names_of(self.trainer)
            check_class_counts(names, self.backbone.num_classes, self.backbone.class_names, "--model.num_classes")
        if getattr(self.trainer.strategy, "_layer_sync", None) is not None:
            raise ConfigError(
                "sync_batchnorm cannot be differentiated twice, and each domain needs statistics of its own. Set "
                "--trainer.sync_batchnorm false: statistics stay on their process, gradients are averaged."
            )
        if getattr(self, "_compiler_ctx", None) or any(hasattr(m, "_orig_mod") for m in self.modules()):
            raise ConfigError(
                "torch.compile cannot differentiate a compiled net twice. Train it uncompiled; compile the net later."
            )
        self.recorded.check(self.trainer.strategy.root_device, self.trainer.world_size)

    def on_train_end(self) -> None:
        """Give the memory of recorded steps back."""
        self.recorded.clear()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Adapt without labels, then the cross-entropy with them."""
        domains = self._domains(batch)
        used = len(batch["image"]) // domains * domains
        images, labels = batch["image"][:used], batch["label"][:used]
        phases = self._phases()
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        measure = bool(phases) and self.global_step % every == 0
        tensors = [images, labels]
        if self.synthesis is not None:
            first = self.global_rank * domains
            key = f"{self.trainer.current_epoch}|{batch_idx}|{torch.initial_seed()}"
            drawn = self.synthesis.draw([f"{key}|{first + i}" for i in range(domains)])
            tensors += [value.to(images.device, non_blocking=True) for value in drawn]
        if batch_idx == 0 or labels.device.type == "cpu":
            head = find_head(self.backbone)[1]
            check_labels(labels, head.out_features)
        outer = partial(self._outer, phases, domains, measure)
        if measure:
            loss, *scalars, cosine = outer(*tensors)
            self.log("meta/alignment", cosine)
        else:
            settings = (phases, domains, self.settings, self.second_order)
            loss, *scalars = self.recorded(self, outer, tensors, settings=settings, processes=self.trainer.world_size)
        self.log("meta/train_loss", loss, prog_bar=True)
        for phase, value in zip(phases, scalars, strict=True):
            self.log(f"meta/inner_{phase}_loss", value)
        return loss

    def _outer(
        self, phases: tuple[Phase, ...], domains: int, measure: bool, images: Tensor, labels: Tensor, *shifts: Tensor
    ) -> tuple[Tensor, ...]:
        """The loss, the first inner loss of each phase, and with ``measure`` the alignment. Of tensors alone."""
        with nullcontext() if self.synthesis is None else self.synthesis.active(*shifts):
            result = adapt_inner(
                self.backbone,
                images,
                self.settings,
                phases=phases,
                domains=domains,
                second_order=self.second_order,
                differentiable=True,
                keep_before=measure,
                rates=self.rates,
                inner_parameters=self.inner_parameters,
            )
        loss = cross_entropy(result.after.flatten(0, 1), labels)
        inner = [losses[0] for losses in result.losses.values()]
        return loss, *inner, *([alignment(result, self.inner_parameters, labels)] if measure else [])

    def _phases(self) -> tuple[Phase, ...]:
        phases = self.settings.phases if self.meta else ()
        return (phases[self.global_step % len(phases)],) if self.schedule == "alternating" and phases else phases

    def _domains(self, batch: dict[str, Tensor]) -> int:
        """How many domains the batch holds, with the pseudo-domains."""
        real = 1
        if "domain" in batch:
            numbers = batch["domain"].tolist()  # the one time that a step waits for the device
            runs = [(number, len(list(run))) for number, run in itertools.groupby(numbers)]
            real = len(runs)
            if len({size for _, size in runs}) > 1 or len({number for number, _ in runs}) != real:
                raise ConfigError(
                    "A batch must hold its domains one after the other, in equal numbers; got domains "
                    f"{numbers}. The data modules of lightning_tta.data make such batches."
                )
        domains = real * self.pseudo_domains
        if len(batch["image"]) < 2 * domains or (real > 1 and len(batch["image"]) % domains):
            raise ConfigError(
                f"A batch of {len(batch['image'])} images cannot be split into {real} domains x {self.pseudo_domains} "
                "pseudo-domains of two or more. Choose train_batch_size as a multiple."
            )
        return domains

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Accuracy before and after adaptation to the batch."""
        self._evaluate(batch, "val", getattr(getattr(self.trainer, "datamodule", None), "val_domain_names", ()))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """The same on the clean test split."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Tensor], split: str, names: Sequence[str] = ()) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            result = adapt_inner(
                self.backbone,
                batch["image"].clone(),  # inference tensors cannot be saved for backward
                self.settings,
                phases=self.settings.phases if self.meta else (),
                rates={kind: float(torch.as_tensor(rate).detach()) for kind, rate in self.rates.items()},
                inner_parameters=self.inner_parameters,
            )
        ends = ["", f"/{names[int(batch['domain'][0])]}"] if "domain" in batch and len(names) > 1 else [""]
        for when, logits in (("before", result.before[0]), ("after", result.after[0])):
            right = (logits.argmax(-1) == batch["label"]).float()
            for end in ends:
                log_mean(self, f"meta/{split}_{when}{end}", right.mean(), len(right), prog_bar=not end)

    def on_validation_epoch_end(self) -> None:
        """Log the mixing weights."""
        weights = torch.cat([layer.mixing.detach() for layer in mixed_batch_norm_layers(self.backbone).values()])
        values = {"mean": weights.mean(), "lowest": weights.min(), "highest": weights.max()}
        self.log_dict({f"meta/source_weight/{name}": value for name, value in values.items()}, sync_dist=True)
        if self.log_rates:
            self.log_dict({f"meta/rate/{kind}": log.exp() for kind, log in self.log_rates.items()}, sync_dist=True)
        for logger in self.loggers:
            add_histogram = getattr(getattr(logger, "experiment", None), "add_histogram", None)
            if add_histogram is not None:
                add_histogram("meta/source_weight", weights.float().cpu(), self.global_step)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Refuses: predictions on a stream go through the test-time module."""
        raise ConfigError(
            "The MetaTTT module trains. To predict, use --model TestTimeAdaptation --model.source_ckpt PATH with "
            "--model.method MetaTTT."
        )

    def configure_optimizers(self) -> Any:
        """The optimizer, with the head's own rate, and, per epoch, the schedule of the configuration."""
        head = set(find_head(self.backbone)[1].parameters())
        learned = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [[p for p in learned if p not in head], [p for p in learned if p in head]]
        optimizer = self.optimizer([{"params": parameters} for parameters in groups])
        optimizer.param_groups[1]["lr"] *= self.head_lr_factor
        return optimizer if self.lr_scheduler is None else ([optimizer], [self.lr_scheduler(optimizer)])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the class, the net and the inner loop, for whoever loads the file."""
        layer, *_ = mixed_batch_norm_layers(self.backbone).values()
        learned = {f"{kind}_lr": float(log.detach().exp()) for kind, log in self.log_rates.items()}
        checkpoint["lightning_tta"] = {
            "class": type(self).__name__,
            **describe_net(self.backbone, checkpoint),
            "mixed_bn": {"parametrisation": layer.parametrization},
            "meta_ttt": {**asdict(self.settings), **learned},
        }
