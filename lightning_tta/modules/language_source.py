"""Training of a language model on its source: the next token."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanMetric

from lightning_tta.backbones import load_weights
from lightning_tta.backbones.gpt import GPT, create_gpt, recipe_of
from lightning_tta.backbones.tokenizer import CHARACTERS, CharTokenizer
from lightning_tta.backbones.weights import digest_of
from lightning_tta.errors import ConfigError, check_choice, check_range
from lightning_tta.modules.source_module import SourceModule, log_mean
from lightning_tta.modules.training import find_checkpoint

Stage = Literal["val", "test"]


class SourceLanguageModel(SourceModule):
    """Minimises the cross-entropy of the next token of prompts and answers, of :class:`~lightning_tta.PromptData`.

    Logs ``source/train_loss``; ``source/val_loss``, the weighted mean over tokens; ``source/val_perplexity``, of all
    tokens but the first; and ``source/val_accuracy``, the share of prompts whose whole answer, with its end, is what
    the net writes by itself when it takes the most probable token each time. No text need be generated for it: that is
    so exactly if each token of the right answer is the most probable one behind those before it. Where validation or
    test has several domains, the accuracy of each is ``source/val_accuracy/DOMAIN``. The same for ``test``.

    The checkpoint holds what rebuilds the net and its tokenizer: ``source_ckpt`` needs nothing else.

    Args:
        backbone: ``gpt``, :class:`~lightning_tta.backbones.gpt.CharGPT`; in Python also a module from ``input_ids`` and
            ``attention_mask`` (B, T) to logits (B, T, V), or to an object that has ``logits``: it is not in the
            checkpoint's recipe.
        backbone_options: Arguments of ``gpt``: ``layers``, ``width``, ``heads``, ``tie_weights``.
        characters: The tokenizer's, each once; by default those of ASCII.
        weights: Start from this checkpoint, or the best of the last finished training in this folder.
        prompt_weight: Weight of a token of the prompt, 0 to 1, where one of the answer, or of its end, has 1. Numbers
            of a problem cannot be foretold, so answers are learned sooner with a small one. With 0 the net does not
            know which prompts are likely, as methods need that use the perplexity of prompts.
        optimizer: Called with the parameters. Default: AdamW with lr 1e-3.
        lr_scheduler: Called with the optimizer; stepped per epoch.

    Raises:
        ConfigError: On another backbone, a wrong option or choice.
    """

    example = "runs/language/source"
    predicts_in = "LanguageAdaptation"

    def __init__(
        self,
        backbone: str | nn.Module = GPT,
        backbone_options: dict[str, Any] | None = None,
        characters: str = CHARACTERS,
        weights: str | None = None,
        prompt_weight: float = 1.0,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        check_range("prompt_weight", prompt_weight, 0, 1)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", *["backbone"] * isinstance(backbone, nn.Module)])
        if isinstance(backbone, nn.Module):
            if backbone_options or weights:
                raise ConfigError("A module that is given has options and weights of its own: leave these out.")
            self.backbone = backbone
        else:
            check_choice("backbone", backbone, (GPT,))
            self.backbone = create_gpt(characters, **(backbone_options or {}))
            if weights is not None:
                load_weights(self.backbone, find_checkpoint(weights, "weights"))
        self._has_weights = isinstance(backbone, nn.Module) or weights is not None
        self.prompt_weight, self.optimizer, self.lr_scheduler = prompt_weight, optimizer, lr_scheduler
        self.val_token_loss, self.test_token_loss = MeanMetric(), MeanMetric()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of token ids (B, T)."""
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask)
        logits: Tensor = getattr(output, "logits", output)
        return logits

    def setup(self, stage: str) -> None:
        """Compare the data's tokenizer with the net's.

        Raises:
            ConfigError: If they are others.
        """
        mine = getattr(self.backbone, "tokenizer", None)
        theirs = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        if isinstance(mine, CharTokenizer) and theirs is not None:
            known = theirs.characters if isinstance(theirs, CharTokenizer) else type(theirs).__name__
            if known != mine.characters:
                raise ConfigError(
                    f"The net's tokens are the characters {mine.characters!r}, those of the data are {known!r}. Give "
                    "the data the net's tokenizer: tokenizer=net.tokenizer, or both the default."
                )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note that there are weights.

        Raises:
            ConfigError: They belong to a net with other options or characters.
        """
        super().on_load_checkpoint(checkpoint)
        then, now = checkpoint.get("lightning_tta", {}).get("language") or {}, recipe_of(self.backbone)
        other = sorted(key for key in {*now, *then} if now and then and now.get(key) != then.get(key))
        if other:
            was, given = ({key: recipe.get(key) for key in other} for recipe in (then, now))
            raise ConfigError(
                f"The checkpoint is of a net with {was}, but this one has {given}. Give --model.backbone_options and "
                "--model.characters as in the training, or its own config.yaml as --config."
            )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy of the tokens that count."""
        losses, _ = self._losses(batch)
        weights = self._weights(batch, batch_idx, losses.dtype)
        loss = (losses * weights).sum() / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)
        self.log("source/train_loss", loss, prog_bar=True)
        return loss

    def _losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of each token but the first: its cross-entropy, and whether it was the most probable one, (B, T - 1)."""
        logits = self(batch["input_ids"], batch["attention_mask"])[:, :-1]
        targets = batch["input_ids"][:, 1:]
        losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view_as(targets), logits.argmax(-1) == targets

    def _weights(self, batch: dict[str, Tensor], batch_idx: int, dtype: torch.dtype) -> Tensor:
        """How much each token but the first counts in the loss, (B, T - 1)."""
        answers = batch["answer_mask"][:, 1:].to(dtype)
        weights = answers + self.prompt_weight * (batch["attention_mask"][:, 1:] - answers)
        if batch_idx == 0 and not bool(weights.any()):  # on a GPU this waits for the device
            raise ConfigError(
                "prompt_weight=0, but the prompts have no answers to learn. Take --model.prompt_weight 1."
            )
        return weights

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Loss, perplexity and accuracy on the validation split."""
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """The same on the test split."""
        self._evaluate(batch, batch_idx, "test")

    def _evaluate(self, batch: dict[str, Tensor], batch_idx: int, stage: Stage) -> None:
        losses, right = self._losses(batch)
        weights = self._weights(batch, batch_idx, losses.dtype)
        total = weights.sum()
        log_mean(self, f"source/{stage}_loss", (losses * weights).sum() / total, float(total), prog_bar=True)
        self._token_loss(stage).update(losses[batch["attention_mask"][:, 1:].bool()])
        answered = batch["answer_mask"].any(1)
        if not bool(answered.any()):
            return
        correct = (right | ~batch["answer_mask"][:, 1:]).all(1)[answered].double().mean()
        log_mean(self, f"source/{stage}_accuracy", correct, int(answered.sum()), prog_bar=True)
        names = self._domain_names(stage)
        if len(names) > 1:  # a batch is of one domain
            log_mean(self, f"source/{stage}_accuracy/{names[int(batch['domain'][0])]}", correct, int(answered.sum()))

    def _domain_names(self, stage: Stage) -> list[str]:
        data = getattr(self.trainer, "datamodule", None)
        return list(getattr(data, "val_domain_names" if stage == "val" else "domain_names", ()))

    def on_validation_epoch_end(self) -> None:
        """The perplexity of all tokens."""
        self._log_perplexity("val")

    def on_test_epoch_end(self) -> None:
        """The perplexity of all tokens."""
        self._log_perplexity("test")

    def _token_loss(self, stage: Stage) -> MeanMetric:
        return self.val_token_loss if stage == "val" else self.test_token_loss

    def _log_perplexity(self, stage: Stage) -> None:
        metric = self._token_loss(stage)
        self.log(f"source/{stage}_perplexity", metric.compute().exp())
        metric.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the class, the net and its tokenizer, for whoever loads the file."""
        state = checkpoint["state_dict"]
        weights = {name: state.get(f"backbone.{name}", value) for name, value in self.backbone.state_dict().items()}
        entry = {"language": recipe_of(self.backbone) or None, "digest": digest_of(weights)}
        checkpoint["lightning_tta"] = {"class": type(self).__name__, **entry}
