"""Adaptation of a language model at test time: prompts go through a method, answers and a report come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import get_loader
from torch import Tensor, nn

from lightning_tta.backbones import state_digest
from lightning_tta.backbones.gpt import create_gpt
from lightning_tta.backbones.huggingface import load_causal_model
from lightning_tta.backbones.tokenizer import CharTokenizer
from lightning_tta.data.protocol import Protocol
from lightning_tta.data.sharing import Sharing
from lightning_tta.data.text.checkers import is_correct
from lightning_tta.data.text.prompt_data import PromptData
from lightning_tta.errors import (
    ConfigError,
    DataError,
    InputError,
    UnsupportedModelError,
    check_choice,
    check_range,
    in_one_line,
)
from lightning_tta.methods import create_method, find
from lightning_tta.methods.base.answering import answer_once, one_by_one
from lightning_tta.methods.base.generation import Generation
from lightning_tta.modules.adaptation import AdaptationModule, callbacks_with
from lightning_tta.modules.loading import load_source, source_recipe
from lightning_tta.run import own_loader
from lightning_tta.run.answers import AnswerRecord, AnswerSummary, AnswerWriter, added, token_measures
from lightning_tta.run.batches import show_source_prompts
from lightning_tta.run.readback import Moment
from lightning_tta.run.stream_run import StreamRun, run_of

DTYPES = ("auto", "float32", "bfloat16", "float16")
_IN_MEANS = ("entropy", "largest_class_share", "logit_norm")


class LanguageAdaptation(AdaptationModule):
    """Adapts a language model along a stream of prompts, in ``predict``, and writes what it answers.

    Batches are those of :class:`~lightning_tta.PromptData`: dicts with ``input_ids`` and ``attention_mask`` (B, T), and
    optionally ``index`` and ``domain`` (B,) and lists of text ``prompt``, ``answer`` (the right one; empty: not known)
    and ``checker``. The method gets the ids, nothing else.

    Directory, files, curves, saved states and the report are those of :class:`~lightning_tta.TestTimeAdaptation`, with
    its callbacks and their options. ``predictions.csv`` has prompt, answer and what was expected as text.
    ``report.json`` has the accuracy with its interval (Clopper-Pearson, 95 %), the mean entropy of the tokens, the
    share of the most frequent answer (``largest_class_share``), the norm of the logits, and the number of new tokens.
    ``forwards`` and ``backwards`` are those of the adaptation, without generation.

    Args:
        method: Name or class of a method over tokens (``zerosiam``); a file with ``class_path`` and ``init_args``
            (``configs/methods/zerosiam.yaml``, whose rates are those of images); or that as a dict.
        options: The method's options; those that are left out are the method's defaults for tokens. They take
            precedence over those of a file. On the command line also ``--model.method.NAME``.
        source_ckpt: Checkpoint of :class:`~lightning_tta.SourceLanguageModel`, or a directory that holds one.
        net: In place of it a folder of a causal language model of transformers, with weights in safetensors, or of an
            adapter of peft, which is added to the weights of its net; in Python also a module. Its tokenizer is the
            data's: ``--data.tokenizer FOLDER``.
        dtype: Of the weights of such a folder: ``auto`` (as they are saved), ``float32``, ``bfloat16`` or ``float16``.
            What adapters learn stays in float32.
        download: Whether ``net`` may be a name that is fetched from the Hugging Face hub.
        select: What learns: ``lora``, ``norm``, ``all``, or a dict as of
            :mod:`lightning_tta.methods.components.adapters`. ``None``: LoRA on the query and value projections.
        task: Which tokens the loss is on, and how many of them go through the head at once: ``{loss_on: generated,
            chunk: 64}``, see :class:`~lightning_tta.methods.base.tokens.Tokens`.
        when: ``before``: answer, then adapt on prompt and answer (online). ``after``: adapt on the prompt first, and
            answer then; with ``loss_on: generated`` on a first answer, which is thrown away.
        reset: When the method returns to the source: ``never``, at each new ``domain``, before each ``batch`` (a chunk
            of prompts, as large as the data's ``batch_size``), before each ``prompt`` (episodic: each is adapted on
            alone), or ``auto``: as usual for the stream's kind.
        reset_every: Also return to the source after this many batches.
        max_new_tokens: Tokens of an answer at most.
        temperature: Of the draw, >= 0; 0: the likeliest token.
        seed: Of the draw.
        stop: Ids of tokens that end an answer; ``None``: those that the tokenizer and the net say end a text.

    Attributes:
        run: What the current or last predict run knows.

    Raises:
        ConfigError: If an option is wrong, before any data is read; when the run begins, if there are several
            processes, the tokenizer is not the net's, or its directory is in use.
        FinishedError: When the run begins, if it is finished.
        WeightsError: If the weights are missing or do not fit.
        UnsupportedModelError: If the method cannot run on a language model.
    """

    kinds = callbacks_with(AnswerWriter)

    def __init__(
        self,
        method: str | dict[str, Any] = "zerosiam",
        options: dict[str, Any] | None = None,
        source_ckpt: str | None = None,
        net: str | nn.Module | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        download: bool = False,
        select: str | dict[str, Any] | list[Any] | None = None,
        task: dict[str, Any] | None = None,
        when: Literal["before", "after"] = "before",
        reset: Literal["auto", "never", "domain", "batch", "prompt"] = "auto",
        reset_every: int | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        stop: list[int] | None = None,
    ) -> None:
        super().__init__()
        check_choice("dtype", dtype, DTYPES)
        check_choice("when", when, ("before", "after"))
        check_choice("reset", reset, ("auto", "never", "domain", "batch", "prompt"))
        if reset_every is not None:
            check_range("reset_every", reset_every, 1, integer=True)
        self.generation = Generation(max_new_tokens, stop or (), temperature, seed)
        if (source_ckpt is None) == (net is None):
            raise ConfigError(
                "Which net? Give either source_ckpt, a checkpoint of SourceLanguageModel, or net, a folder of a causal "
                f"language model of transformers; got source_ckpt={source_ckpt!r}, net={net!r}."
            )
        name, of_method = _method_of(method)
        find(name)
        self.when, self.reset, self.reset_every, self.stop = when, reset, reset_every, stop
        given = {**of_method, **(options or {})}
        _check_options(name, given)
        self.episodic = reset == "prompt"
        self.recipe = source_recipe(source_ckpt) if net is None else None
        if net is None and self.recipe is None:
            raise ConfigError(f"source_ckpt={source_ckpt!r}: answers need trained weights. Give a checkpoint.")
        if isinstance(net, nn.Module):
            source, named = net, type(net).__name__
        elif net is not None:
            source, named = load_causal_model(net, dtype, download), Path(net).name
        else:
            assert self.recipe is not None
            source, named = load_source(source_ckpt), Path(self.recipe["source_ckpt"]).name
        kind = type(source).__name__
        weights = "module" if isinstance(net, nn.Module) else named
        self.net_info = {"name": kind, "weights": weights, "digest": state_digest(source)}
        self.net_tokenizer = getattr(source, "tokenizer", None)
        self.ends = _ends_of(source)
        asked = {"select": select, "task": {"kind": "tokens", **(task or {})}}
        self.method = create_method(name, source, **{**given, **{k: v for k, v in asked.items() if v is not None}})
        self.execution = self.method.execution
        self.tokenizer: Any = None

    # Before the stream

    def _make_run(self) -> StreamRun:
        trainer = self.trainer
        if trainer.world_size > 1:
            raise ConfigError(
                f"LanguageAdaptation runs on one process; there are {trainer.world_size}. Use --trainer.devices 1."
            )
        module = getattr(trainer, "datamodule", None)
        data = module if isinstance(module, PromptData) else None
        self.tokenizer = getattr(module, "tokenizer", None) or self.net_tokenizer
        if self.tokenizer is None:
            raise ConfigError(
                "No tokenizer, which makes text of what the net writes. Predict with a data module that has one as "
                "its attribute 'tokenizer', such as PromptData."
            )
        self._check_tokenizer()
        ends = {int(end) for end in (self.tokenizer.eos_token_id, *self.ends) if end is not None}
        stop = sorted(ends) if self.stop is None else list(self.stop)
        pad = self.tokenizer.pad_token_id
        self.generation = Generation(
            self.generation.max_new_tokens,
            stop,
            self.generation.temperature,
            self.generation.seed,
            int(pad) if pad is not None else (stop[0] if stop else 0),
        )
        how = {name: getattr(self.generation, name) for name in ("max_new_tokens", "stop", "temperature", "seed")}
        if not self.generation.temperature:
            del how["seed"]
        kind, spans = ("custom", False) if data is None else (data.stream_kind, data.spans_domains)
        protocol = Protocol.from_parts(
            self._described_loaders() if data is None else data.describe(),
            reset=self._policy(kind, spans),
            predict="method" if self.when == "before" else "after",
            weights=f"{self.net_info['name']}: {self.net_info['weights']}",
            weights_digest=self.net_info["digest"],
            preprocessing={**({} if data is None else data.preprocessing()), "generation": how},
        )
        return StreamRun(
            trainer=trainer,
            method=self.method,
            net=self.net_info,
            protocol=protocol,
            data=None,
            reset_every=self.reset_every,
            classes=None,
            sharing=Sharing(),
            recipe=self.recipe,
            account_of=AnswerSummary,
        )

    def _check_tokenizer(self) -> None:
        """Refuse a tokenizer whose ids mean something else to the net, as far as that can be known."""
        net, data = self.net_tokenizer, self.tokenizer
        characters = [each.characters if isinstance(each, CharTokenizer) else None for each in (net, data)]
        if characters[0] != characters[1]:
            what = "was trained on characters with its own tokenizer" if characters[0] else "is no net of characters"
            raise ConfigError(
                f"The net ({self.net_info['name']}) {what}, and the data's tokenizer is {type(data).__name__}, with "
                "other ids. Give the data the tokenizer of the net: --data.tokenizer FOLDER for a folder of "
                "transformers; leave it out for a net of SourceLanguageModel."
            )
        size, rows = len(data), self.method.model.vocabulary
        if isinstance(rows, int) and size > rows:
            raise ConfigError(
                f"The tokenizer has {size} tokens, and the net's vocabulary {rows}: it is not the tokenizer of the "
                "net. Give --data.tokenizer the folder of the net."
            )
        if isinstance(rows, int) and (beyond := [token for token in self.stop or () if token >= rows]):
            raise ConfigError(
                f"stop has {', '.join(map(str, beyond))}, and the net's tokens are 0 to {rows - 1}: no answer would "
                "end there. Leave it out to stop at what the tokenizer and the net say ends a text."
            )

    def on_predict_start(self) -> None:
        """Take up what was saved, or show training prompts to a method that must see them."""
        run = run_of(self)
        run.restore()
        if not run.method.prepared:
            data = getattr(self.trainer, "datamodule", None)
            show_source_prompts(run.method, data, self._input.source_images, self.device)

    # Along the stream

    def forward(self, batch: Mapping[str, Tensor], number: int = 0) -> tuple[dict[str, Tensor], Tensor]:
        """Answer a batch of prompts and adapt on it, in the order of ``when``.

        Args:
            batch: ``input_ids`` and ``attention_mask`` (B, T).
            number: Of the batch in the stream, for draws of its own.

        Returns:
            Prompts with answers, as of :meth:`~lightning_tta.methods.base.method.TTAMethod.generate`; and the logits
            (B, T + N, V) of the net that wrote them.
        """
        method = self.method if self.run is None else self.run.method
        how = vars(self.generation) | {"seed": self.generation.seed + number}
        return answer_once(method, batch, when=self.when, **how)

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int | None = None) -> Any:
        """One batch of the stream, in order: reset if the policy says so, answer, adapt.

        Returns :meth:`~lightning_tta.run.summary.BatchRecord.outputs`; ``None`` for a batch that an earlier run did.
        """
        run = run_of(self)
        if run.is_done(batch):
            return None
        try:
            return run.account(self._step(run, batch, dataloader_idx))
        except InputError as error:
            if not self._input.skips:
                raise
            self._warn_of_skip("A batch", error)
            return run.account(_refused(batch, error, run))

    def _step(self, run: StreamRun, batch: Any, loader: int | None) -> AnswerRecord:
        ids = _ids_of(batch)
        count, number = len(ids), run.batches
        index, _ = own_loader.index_of(batch, count, run.seen)
        domain = self._domain_of(batch, count, run, loader)
        texts = {name: _texts(batch, name, count) for name in ("prompt", "answer", "checker")}
        self._begins(run, domain)
        seconds, stats, answers = 0.0, list[dict[str, float]](), list[str]()
        measured: dict[str, list[Tensor]] = {}
        for row, piece in enumerate(one_by_one(batch) if self.episodic else [batch]):
            if self.episodic and (row or run.summary.batches):
                run.method.reset()
                run.summary.resets += 1
            start = Moment(run.device)
            answered, logits = self(piece, run.seen + row if self.episodic else number)
            seconds += Moment(run.device).seconds_since(start)
            stats.append(dict(run.method.stats))
            new = answered["generated"]
            for name, value in token_measures(logits, answered["input_ids"], new).items():
                measured.setdefault(name, []).append(value)
            rows = zip(answered["input_ids"].cpu(), new.cpu(), strict=True)
            answers += [
                self.tokenizer.decode(tokens[there].tolist(), skip_special_tokens=True) for tokens, there in rows
            ]
            del logits
        prompts = texts["prompt"] or [
            self.tokenizer.decode(tokens[there.bool()].tolist(), skip_special_tokens=True)
            for tokens, there in zip(ids.cpu(), batch["attention_mask"].cpu(), strict=True)
        ]
        expected = texts["answer"] or [""] * count
        checkers = texts["checker"] or ["exact"] * count
        correct = [
            is_correct(text, answer, checker) if answer else None
            for text, answer, checker in zip(answers, expected, checkers, strict=True)
        ]
        means = {"token_" + name: value for name, value in added(stats).items() if name in _IN_MEANS}
        return AnswerRecord(
            torch.zeros(count, 0),
            index,
            domain,
            torch.full((count,), -1),
            {**{name: value for name, value in added(stats).items() if name not in _IN_MEANS}, **means},
            seconds,
            prompts=prompts,
            answers=answers,
            expected=expected,
            correct=correct,
            tokens=torch.cat(measured["tokens"]),
            entropy=torch.cat(measured["entropy"]),
            confidence=torch.cat(measured["confidence"]),
            norm=torch.cat(measured["norm"]),
        )

    def _domain_of(self, batch: Mapping[str, Any], count: int, run: StreamRun, loader: int | None) -> Tensor:
        """Numbers of the domains (B,): those of the data module, or what a loader says."""
        if isinstance(getattr(self.trainer, "datamodule", None), PromptData) and "domain" in batch:
            return torch.as_tensor(batch["domain"]).cpu()
        return own_loader.domain_of(batch, count, run.summary, loader)


def _method_of(method: str | dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and options of a method that is named, or written as a class with its arguments, here or in a file."""
    if isinstance(method, str) and Path(method).suffix in (".yaml", ".yml"):
        try:
            method = get_loader("yaml")(Path(method).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"method={method!r} is a file that cannot be read: {in_one_line(error)}") from error
    if isinstance(method, str):
        return _name_of(method), {}
    if not isinstance(method, Mapping) or not isinstance(method.get("class_path"), str):
        raise ConfigError(
            f"method must be a name, such as 'zerosiam', or have a class_path and init_args; got {method!r}. "
            "Options go beside it: --model.method zerosiam --model.options.lr 1e-4."
        )
    if unknown := set(method) - {"class_path", "init_args"}:
        raise ConfigError(f"method has {', '.join(sorted(unknown))} beside class_path and init_args. Leave them out.")
    return _name_of(method["class_path"]), dict(method.get("init_args") or {})


def _name_of(path: str) -> str:
    """The name in the import path of a method, or the path where it is a name already."""
    package, _, name = path.rpartition(".")
    if package and package.partition(".")[0] != "lightning_tta":
        raise ConfigError(
            f"method={path!r} is no method of this package, which LanguageAdaptation takes by their names, such as "
            "'zerosiam'. In Python, wrap the net in your class, and answer with lightning_tta.answer(method, batch)."
        )
    return name


def _check_options(name: str, options: dict[str, Any]) -> None:
    """Refuse wrong options before weights are read: a tiny net gets the method."""
    with torch.random.fork_rng(devices=[]), suppress(UnsupportedModelError):  # it says nothing of the net that comes
        create_method(name, create_gpt("ab", layers=1, width=8, heads=1), **{**options, "task": "tokens"})


def _ends_of(net: nn.Module) -> list[int]:
    """Ids that end a text, as a net of transformers says."""
    ends = getattr(getattr(net, "generation_config", None), "eos_token_id", None)
    return [int(end) for end in (ends if isinstance(ends, (list, tuple)) else [ends]) if end is not None]


def _ids_of(batch: Any) -> Tensor:
    """The ids of a batch of prompts; the method checks their values.

    Raises:
        InputError: If there are none.
    """
    if not isinstance(batch, Mapping) or not {"input_ids", "attention_mask"} <= batch.keys():
        raise InputError(
            f"Batches must be dicts with 'input_ids' and 'attention_mask' (B, T); got a {type(batch).__name__}."
        )
    ids = batch["input_ids"]
    if not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.numel():
        got = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise InputError(f"input_ids must be token ids (B, T) with B, T >= 1; got {got}.")
    return ids


def _texts(batch: Mapping[str, Any], name: str, count: int) -> list[str]:
    """A list of texts of a batch; empty where it has none.

    Raises:
        DataError: If it is no text for each prompt.
    """
    value = batch.get(name)
    if value is None:
        return []
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != count:
        raise DataError(f"batch[{name!r}] of {count} prompts must be a list of text, one for each; got {value!r:.100}.")
    if not all(isinstance(text, str) for text in value):
        raise DataError(f"batch[{name!r}] must be a list of text; got {value!r:.100}.")
    return list(value)


def _refused(batch: Any, error: InputError, run: StreamRun) -> AnswerRecord:
    """The record of a batch that cannot be used: as many prompts as ``index`` has, or none."""
    index = torch.zeros(0, dtype=torch.int64)
    with suppress(Exception):
        index = torch.as_tensor(batch["index"]).cpu()
    domain = torch.zeros(len(index), dtype=torch.int64)
    with suppress(Exception):
        domain = torch.as_tensor(batch["domain"]).cpu()
    rest = (domain, torch.full((len(index),), -1))
    return AnswerRecord(torch.zeros(len(index), 0), index, *rest, adapted=False, error=str(error))
