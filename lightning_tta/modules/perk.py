"""PERK: a language model that learns to learn a context into its LoRA, and to answer from there."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lightning_tta.backbones import load_weights
from lightning_tta.backbones.gpt import CharGPT
from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.backbones.split import find_head
from lightning_tta.backbones.tokenizer import CharTokenizer
from lightning_tta.backbones.weights import read_checkpoint
from lightning_tta.errors import ConfigError, WeightsError, check_choice, check_range
from lightning_tta.meta.perk import (
    ContextLoop,
    Learned,
    TokenWeights,
    learn_context,
    mean_loss,
    next_token_losses,
    run_with,
)
from lightning_tta.methods.components.adapters import put_in
from lightning_tta.modules.loading import load_source
from lightning_tta.modules.source_module import log_mean
from lightning_tta.modules.training import TrainingRecord, find_checkpoint

Reading = Literal["adapter", "prompt"]


class PERK(LightningModule):
    """Minimises the loss of answers, given the questions alone, after the context was learned into a LoRA.

    Inner loop (:func:`lightning_tta.meta.perk.learn_context`): K steps on the next-token loss of the context's
    segments, as one batch without order, on a functional copy of the LoRA. Outer step: the cross-entropy of the
    answers' tokens with that copy, without the context in the prompt, differentiated through the last T inner steps
    into the LoRA's initial values, the inner rates and the token weights. The net beside them stays as it is.

    With ``reading="prompt"`` the context stands before the question in the prompt, there is no inner loop, and the
    whole net learns: the authors' baseline (FT-ICR), and the net that a training with ``reading="adapter"`` starts
    from. Logs under ``perk/``: ``train_loss`` (outer), ``inner_first_loss`` and ``inner_last_loss`` (of the first and
    the last inner step), ``val_loss``, ``val_accuracy`` and ``val_without`` (accuracy without any context), the same
    for test. An answer is right if all its tokens have the largest logit, each given those before it: then it is what
    greedy decoding writes.

    Batches are ``{segments (D, S, T), segment_mask, questions (D, Q, L), answer_mask}``: token ids of D contexts in S
    segments and of their Q questions, with the answers, padded on the right; with bool masks of the same shapes of
    which tokens of the segments are no padding, and which of the questions are answer. See
    :class:`~lightning_tta.data.recall.RecallData`.

    At test time: ``memory = module.memorize(segments)``, ``module.answer_logits(memory, questions)``, or
    ``with module.reading_from(memory) as net:`` for whatever the net can do, such as ``generate``. The module itself
    does not change, so that each context starts from the same values.

    Args:
        source_ckpt: A checkpoint, or the folder of a finished training, of this module or of
            :class:`~lightning_tta.SourceLanguageModel`; or a file of weights, such as safetensors, of ``backbone``. Its
            net is where this one starts.
        backbone: The language model: ``forward(input_ids) -> logits (B, T, V)``, as a tensor or as the attribute
            ``logits``; or arguments of :class:`~lightning_tta.backbones.gpt.CharGPT`, such as ``{layers: 2}``. Not
            needed with a checkpoint that says them.
        reading: ``adapter`` or ``prompt``.
        adapter: What learns in the inner loop: ``{kind: lora}`` with its options, see
            :mod:`lightning_tta.methods.components.adapters`; or another ``select``. By default LoRA of rank 16 in
            every linear layer but the last. Authors: rank 256, all linear layers.
        learn_rates: Learn a rate for each step and each tensor of the adapter (authors); their logarithms, which
            keeps them positive.
        token_weights: Learn how much each of a context's tokens counts in the inner loss, from the last features
            (authors' code).
        learn_all: Whether the outer step changes the rest of the net too; not so in the paper.
        language_loss: With ``reading="prompt"``: the weight of the loss of all other tokens, beside the answers' one.
        rate_lr_factor: The learning rate of the logarithms of the rates, over that of the rest.
        optimizer: Called with the parameters. Default: AdamW with lr 1e-3 and without weight decay.
        lr_scheduler: Called with the optimizer; stepped per epoch.
        inner: Settings of :class:`~lightning_tta.meta.perk.ContextLoop` by name, such as ``steps=4``.

    Raises:
        ConfigError: If a value is out of range, or there is no net.
        WeightsError: If the file does not say its net, or has other weights than the net.

    Source: PERK, arXiv 2507.06415, and the authors' code. Differs from them: no dropout and no weight decay in the
    inner loop; a LoRA of scale 1; rates are learned by their logarithms; contexts of a batch learn at once.
    """

    def __init__(
        self,
        source_ckpt: str | None = None,
        backbone: dict[str, Any] | nn.Module | None = None,
        reading: Reading = "adapter",
        adapter: str | dict[str, Any] | list[Any] | None = None,
        learn_rates: bool = True,
        token_weights: bool = False,
        learn_all: bool = False,
        language_loss: float = 0.1,
        rate_lr_factor: float = 10.0,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable | None = None,
        steps: int = 4,
        unrolled_steps: int = 2,
        inner_optimizer: Literal["adamw", "sgd"] = "adamw",
        inner_lr: float = 1e-2,
    ) -> None:
        super().__init__()
        check_choice("reading", reading, ("adapter", "prompt"))
        check_range("language_loss", language_loss, 0)
        check_range("rate_lr_factor", rate_lr_factor, 0)
        self.settings = ContextLoop(steps, unrolled_steps, inner_optimizer, inner_lr)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", *["backbone"] * isinstance(backbone, nn.Module)])
        self.backbone = _language_model(source_ckpt, backbone)
        self.backbone.eval()
        self.reading, self.language_loss, self.rate_lr_factor = reading, language_loss, rate_lr_factor
        self.names: list[str] = []
        self.log_rates: nn.Parameter | None = None
        self.weights: TokenWeights | None = None
        if reading == "adapter":
            words, names = put_in(self.backbone, {"kind": "lora", "rank": 16} if adapter is None else adapter)
            if words or not names:
                raise ConfigError(f"adapter must be kinds of adapters, such as 'lora'; got {adapter!r}.")
            self.names = list(names)
            self.backbone.requires_grad_(learn_all)
            for name in names:
                self.backbone.get_parameter(name).requires_grad_(True)
            if learn_rates and steps:
                self.log_rates = nn.Parameter(torch.full((steps, len(names)), inner_lr).log())
            if token_weights:
                self.weights = TokenWeights(find_head(self.backbone)[1].in_features)
        else:
            self.backbone.requires_grad_(True)
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (B, T, V) of token ids (B, T), padded on the right, without any context."""
        return run_with(self.backbone, {}, input_ids[None])[0]

    def train(self, mode: bool = True) -> PERK:
        """Record ``mode``; the net stays in eval mode, so that its passes see the same net."""
        super().train(mode)
        self.backbone.eval()
        return self

    def configure_callbacks(self) -> list[Callback]:
        """What marks a finished training."""
        return [TrainingRecord()]

    @property
    def rates(self) -> Tensor | None:
        """The learned rates (K, P) of each step and tensor of the adapter."""
        return None if self.log_rates is None else self.log_rates.exp()

    def _learn(self, segments: Tensor, counts: Tensor, differentiable: bool) -> Learned:
        return learn_context(
            self.backbone,
            self.names,
            segments,
            counts,
            self.settings,
            differentiable=differentiable,
            rates=self.rates,
            weights=self.weights,
            head=None if self.weights is None else find_head(self.backbone)[1],
        )

    # Test time

    def memorize(self, segments: Tensor, segment_mask: Tensor | None = None) -> dict[str, Tensor]:
        """Learn contexts, each from the same start; the module does not change.

        Args:
            segments: Token ids (D, S, T) of D contexts in S segments, padded on the right; int64.
            segment_mask: Which tokens are no padding, bool (D, S, T); ``None``: all.

        Returns:
            The memory: the adapter's tensors after the steps by name, each (D, ...).

        Raises:
            ConfigError: If the module reads from the prompt.
            InputError: If shapes do not fit.
        """
        if self.reading != "adapter":
            raise ConfigError("reading='prompt' has no memory: give the context in the prompt.")
        with outside_inference_mode():
            counts = torch.ones_like(segments, dtype=torch.bool) if segment_mask is None else segment_mask.clone()
            return self._learn(segments.clone(), counts, differentiable=False).parameters

    @torch.no_grad()
    def answer_logits(self, memory: Mapping[str, Tensor], questions: Tensor) -> Tensor:
        """Logits (D, Q, L, V) of questions (D, Q, L) of D contexts, answered from their memory."""
        return run_with(self.backbone, memory, questions)

    @contextmanager
    def reading_from(self, memory: Mapping[str, Tensor], index: int = 0) -> Iterator[nn.Module]:
        """The net itself with the memory of one context in place, for any call of it; afterwards it is as before."""
        parameters = {name: self.backbone.get_parameter(name) for name in memory}
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        try:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(memory[name][index])
            yield self.backbone
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(before[name])

    # Training

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The outer loss."""
        if self.reading == "prompt":
            ids, answers, counts = prompts(batch, together=True)
            losses = next_token_losses(self(ids), ids)
            answers, others = answers[:, 1:], counts[:, 1:] & ~answers[:, 1:]
            loss = (losses * answers).sum() / answers.sum()
            total = loss + self.language_loss * (losses * others).sum() / others.sum().clamp_min(1)
        else:
            learned = self._learn(batch["segments"], batch["segment_mask"], differentiable=True)
            logits = run_with(self.backbone, learned.parameters, batch["questions"])
            total = loss = mean_loss(logits, batch["questions"], batch["answer_mask"]).mean()
            if learned.losses:
                self.log_dict({"perk/inner_first_loss": learned.losses[0], "perk/inner_last_loss": learned.losses[-1]})
        self.log("perk/train_loss", loss, prog_bar=True)
        return total

    def answers(self, batch: dict[str, Tensor], context: bool = True) -> tuple[Tensor, Tensor]:
        """Whether each answer is right, bool (D, Q), and the mean loss of the answers' tokens.

        Args:
            batch: As in training.
            context: Whether the module learns or reads the context; else it has the question alone.
        """
        questions, mask = batch["questions"], batch["answer_mask"]
        if self.reading == "prompt" and context:
            ids, answer, _ = prompts(batch, together=False)
            with torch.no_grad():
                logits = self(ids)
            right = all_right(logits, ids, answer).view(questions.shape[:2])
            return right, mean_loss(logits[None], ids[None], answer[None])[0]
        memory = self.memorize(batch["segments"], batch["segment_mask"]) if context else {}
        logits = self.answer_logits(memory, questions)
        return all_right(logits, questions, mask), mean_loss(logits, questions, mask).mean()

    def _evaluate(self, batch: dict[str, Tensor], split: str, end: str = "") -> None:
        for name, context in (("accuracy", True), ("without", False)):
            right, loss = self.answers(batch, context)
            values = {name: right.float().mean(), **({"loss": loss} if context else {})}
            for each, value in values.items():
                bar = each == "accuracy"
                log_mean(
                    self, f"perk/{split}_{each}{end}", value, right.numel(), prog_bar=bar, add_dataloader_idx=False
                )

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Accuracy with and without the context."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """The same, for each test loader."""
        names = getattr(getattr(self.trainer, "datamodule", None), "test_names", ())
        self._evaluate(batch, "test", f"/{names[dataloader_idx]}" if dataloader_idx < len(names) else "")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Whether each answer is right, ``right`` (D, Q)."""
        return {"right": self.answers(batch)[0]}

    def configure_optimizers(self) -> Any:
        """The optimizer, with the rates' own rate, and, per epoch, the schedule of the configuration."""
        groups = [[p for p in self.parameters() if p.requires_grad and p is not self.log_rates]]
        groups += [] if self.log_rates is None else [[self.log_rates]]
        optimizer = self.optimizer([{"params": parameters} for parameters in groups])
        if self.log_rates is not None:
            optimizer.param_groups[1]["lr"] *= self.rate_lr_factor
        return optimizer if self.lr_scheduler is None else ([optimizer], [self.lr_scheduler(optimizer)])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the class and the net; what is loaded needs the checkpoint that it was trained from no more."""
        config = getattr(self.backbone, "config", None) if isinstance(self.backbone, CharGPT) else None
        checkpoint["lightning_tta"] = {"class": type(self).__name__, "language_model": config, **asdict(self.settings)}
        if config is not None and "hyper_parameters" in checkpoint:
            checkpoint["hyper_parameters"] |= {"source_ckpt": None, "backbone": config}


def prompts(batch: Mapping[str, Tensor], together: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Contexts with their questions behind them, padded on the right.

    Args:
        batch: See :class:`PERK`.
        together: All questions of a context one after the other, in one row; else a row for each.

    Returns:
        Token ids (N, T), and bool (N, T): which tokens are answers, and which are no padding; N = D, or D * Q.
    """
    rows: list[Tensor] = []
    masks: list[Tensor] = []
    for context, mask, questions, answers in zip(
        batch["segments"], batch["segment_mask"], batch["questions"], batch["answer_mask"], strict=True
    ):
        words = context[mask]
        none = torch.zeros_like(words, dtype=torch.bool)
        ends = [int(row.nonzero()[-1]) + 1 for row in answers]  # of each question, with its answer
        asked = [(q[:end], a[:end]) for q, a, end in zip(questions, answers, ends, strict=True)]
        if together:
            asked = [(torch.cat([q for q, _ in asked]), torch.cat([a for _, a in asked]))]
        for question, answer in asked:
            rows.append(torch.cat([words, question]))
            masks.append(torch.cat([none, answer]))
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    ids, answers = pad_sequence(rows, batch_first=True), pad_sequence(masks, batch_first=True)
    return ids, answers, torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]


def all_right(logits: Tensor, ids: Tensor, answer: Tensor) -> Tensor:
    """Whether every token of the answer has the largest logit, bool (...), of (..., T, V), (..., T), (..., T)."""
    right = logits[..., :-1, :].argmax(-1) == ids[..., 1:]
    return (right | ~answer[..., 1:]).all(-1)


def _language_model(source_ckpt: str | None, backbone: dict[str, Any] | nn.Module | None) -> nn.Module:
    """The net that is given, or that a checkpoint says, with the weights of the checkpoint.

    Raises:
        ConfigError: If there is none.
        WeightsError: If the checkpoint has no language model, or another one.
    """
    path = None if source_ckpt is None else find_checkpoint(source_ckpt)
    content = None if path is None or path.suffix == ".safetensors" else read_checkpoint(path)
    entry = content.get("lightning_tta") if isinstance(content, dict) else None
    saved = entry if isinstance(entry, dict) else {}
    of_source = saved.get("language")
    if of_source and backbone is None:
        return load_source(source_ckpt)
    config = backbone if isinstance(backbone, Mapping) else saved.get("language_model")
    if isinstance(backbone, nn.Module):
        net: nn.Module = copy.deepcopy(backbone)
    elif isinstance(config, Mapping):
        net = CharGPT(**{"vocab_size": CharTokenizer().vocab_size, **config})
    elif path is None:
        raise ConfigError(
            "Which language model? Give backbone={layers: 2, width: 64, heads: 4}, a module with backbone=MODULE in "
            "Python, or source_ckpt=PATH, a checkpoint of PERK or of SourceLanguageModel."
        )
    else:
        raise WeightsError(
            f"{path} does not say which language model it is for. Give a checkpoint of PERK or of SourceLanguageModel; "
            "or with this file its net, backbone={layers: 2, width: 64, heads: 4}, or backbone=MODULE in Python."
        )
    if path is None:
        return net
    if "language_model" in saved:
        state = content.get("state_dict", {}) if isinstance(content, dict) else {}
        weights = {name.removeprefix("backbone."): v for name, v in state.items() if name.startswith("backbone.")}
        try:
            net.load_state_dict(weights)
        except RuntimeError as error:
            raise WeightsError(
                f"{path} does not have the weights of this {type(net).__name__}: {error}. Give a checkpoint of PERK "
                "with reading='prompt', of the same net; to go on with a trained adapter, PERK.load_from_checkpoint."
            ) from error
        return net
    try:
        load_weights(net, path)
    except WeightsError as error:
        hint = " The file says which net it is for: leave backbone out (--model.backbone null)." if of_source else ""
        raise WeightsError(f"{error}{hint}") from error
    return net
