"""Prompts with answers as a LightningDataModule: embedded tasks and JSONL files, shifted, in streams."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_tta.backbones.tokenizer import CharTokenizer, load_tokenizer
from lightning_tta.data import samplers, streams
from lightning_tta.data.domain_names import VISIT, split_severity
from lightning_tta.data.images import StreamSampler, already_collated
from lightning_tta.data.splits import subset
from lightning_tta.data.streams import Stream, build_stream, permutation
from lightning_tta.data.text import dialects
from lightning_tta.data.text.arithmetic import SHARES, Arithmetic, Split
from lightning_tta.data.text.batches import AnsweredBatches, Encoder, PromptBatches, TokenBatch
from lightning_tta.data.text.checkers import CHECKERS
from lightning_tta.data.text.prompts import Keys, Prompt, read_jsonl
from lightning_tta.data.text.python_text import CORPORA, cut, read_corpus
from lightning_tta.errors import ConfigError, check_choice, check_names, check_range, did_you_mean

SOURCE = "source"
"""The domain in whose format the source is trained."""
STREAMS = ("iid", "continual", "mixed", "label_shift", "correlated", "ordered", "recurring")
CLASSES: dict[str, Callable[[str], str]] = {
    "first": lambda answer: answer[:1],
    "answer": str,
    "length": lambda answer: str(len(answer)),
}
"""What makes a class of answers: the same first character, the same text, as many characters."""
VALIDATION = 0.1
"""Share of a user's own training prompts that is held out."""


class PromptData(LightningDataModule):
    """Prompts with answers: to train a language model on, and as a stream of shifted test prompts.

    Three tasks. ``arithmetic``: problems such as ``12+7=`` with exact answers. ``text``: pieces of the docstrings of
    Python's standard library, without answers, for perplexity. ``files``: JSONL files, one object with ``prompt``,
    ``answer`` and perhaps ``checker``, ``domain`` and ``index`` a line. Nothing is downloaded.

    Domains of ``arithmetic`` and ``text`` are dialects, see :mod:`lightning_tta.data.text.dialects`: ``words`` changes
    all its places, ``words@2`` two fifths of them. ``source`` is the source's own format, ``reported`` and ``held_out``
    are groups: choose options on the held-out ones. ``text`` has ``topics`` and ``zen`` beside, which are other texts.
    Domains of ``files`` are what their lines say, else the files' names.

    Train, val and test batches are {input_ids, attention_mask, answer_mask (B, T), index, domain (B,)}, padded on the
    right, with answers. The stream's, from :meth:`predict_dataloader`, are {input_ids, attention_mask (B, T), index,
    domain (B,), prompt, answer, checker (lists of text)}, padded on the left, without answers. ``index`` is unique in
    the whole stream (:meth:`prompt_of`), ``domain`` a position in :attr:`stream_domains`.

    Args:
        task: ``arithmetic``, ``text`` or ``files``.
        files: Test prompts of ``files``, in the order of the stream's domains.
        train_files: Training prompts of ``files``, of which a tenth is for validation.
        tokenizer: Folder or name of a tokenizer of transformers; in Python also a tokenizer. By default characters.
        download: Whether a name may be fetched from the Hugging Face hub.
        template: What the net reads, with ``{prompt}`` in it.
        chat: Whether the tokenizer's chat template goes around that.
        checker: That of prompts in ``files`` which name none: ``exact``, ``number`` or ``multiple_choice``.
        prompt_key: What ``files`` call the prompt.
        answer_key: What they call the answer.
        domain_key: What they call the domain.
        domains: The stream's domains, and those of the test. By default those that are reported, or all of ``files``.
        train_domains: Those of the training; each training prompt is written in each of them.
        val_domains: Those of the validation.
        severity: Severity of dialects that name none, 1 to 5.
        classes_by: What makes a class of answers, for streams that sort: ``first`` (character), ``answer`` or
            ``length``.
        classes: Only prompts of these classes, such as ``["9"]``: a stream of one class.
        num_prompts: At most so many prompts of each domain, a fixed random subset; by default all.
        stream: ``iid``, ``continual``, ``mixed``, ``label_shift`` (each domain sorted by class of answers),
            ``correlated``, ``ordered`` or ``recurring``; see :func:`~lightning_tta.data.streams.build_stream`.
        order_seed: Seed of the order of the stream.
        dirichlet: Concentration of the classes over time, as of images.
        visits: How often a ``recurring`` stream goes through all domains.
        batch_size: Prompts in a batch of the stream.
        train_batch_size: Prompts in a batch of the train, val and test loaders.
        digits: Digits of the numbers of ``arithmetic`` at most, 1 to 3.
        operations: Some of ``+``, ``-`` and ``*``.
        problems: At most so many problems in all splits; by default 10,000 an operation.
        piece: Characters of a prompt of ``text``.
        seed: Seed of the splits, of the problems and of the places that dialects change.
        num_workers: Worker processes of each loader.

    Raises:
        ConfigError: On any wrong value, before data is read.
        DataError: On a wrong file, with the line.
    """

    def __init__(
        self,
        task: Literal["arithmetic", "text", "files"] = "arithmetic",
        files: list[str] | None = None,
        train_files: list[str] | None = None,
        *,
        tokenizer: Any = None,
        download: bool = False,
        template: str = "{prompt}",
        chat: bool = False,
        checker: Literal["exact", "number", "multiple_choice"] = "exact",
        prompt_key: str = "prompt",
        answer_key: str = "answer",
        domain_key: str = "domain",
        domains: list[str] | None = None,
        train_domains: list[str] | None = None,
        val_domains: list[str] | None = None,
        severity: int = 5,
        classes_by: Literal["first", "answer", "length"] = "first",
        classes: list[str] | None = None,
        num_prompts: int | None = None,
        stream: Literal["iid", "continual", "mixed", "label_shift", "correlated", "ordered", "recurring"] = "iid",
        order_seed: int = 0,
        dirichlet: float | None = None,
        visits: int | None = None,
        batch_size: int = 8,
        train_batch_size: int = 128,
        digits: int = 2,
        operations: list[str] | None = None,
        problems: int | None = None,
        piece: int = 96,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_choice("task", task, ("arithmetic", "text", "files"))
        check_choice("checker", checker, tuple(CHECKERS))
        check_choice("classes_by", classes_by, tuple(CLASSES))
        check_choice("stream", stream, STREAMS)
        for name, value in {"batch_size": batch_size, "train_batch_size": train_batch_size}.items():
            check_range(name, value, 1, integer=True)
        for name, value in {"order_seed": order_seed, "seed": seed, "num_workers": num_workers}.items():
            check_range(name, value, 0, integer=True)
        check_range("severity", severity, 1, 5, integer=True)
        check_range("piece", piece, 8, integer=True)
        if num_prompts is not None:
            check_range("num_prompts", num_prompts, 1, integer=True)
        for name, names in {"files": files, "train_files": train_files, "classes": classes}.items():
            check_names(name, names)
        if (task == "files") != bool(files or train_files):
            raise ConfigError(
                f"files={files!r} and train_files={train_files!r} do not go with task={task!r}: task='files' needs "
                "some, another task has none."
            )
        self.task, self.files, self.train_files = task, list(files or []), list(train_files or [])
        self.keys, self.checker = Keys(prompt_key, answer_key, domain=domain_key), checker
        self.arithmetic = Arithmetic(digits, operations or ["+"], problems, seed)
        self.piece, self.seed, self.severity, self.num_prompts = piece, seed, severity, num_prompts
        self.classes_by, self.classes = classes_by, classes
        self.stream_kind, self.order_seed = stream, order_seed
        self.stream_options = streams.options_of(stream, {"dirichlet": dirichlet, "visits": visits})
        self.batch_size, self.train_batch_size, self.num_workers = batch_size, train_batch_size, num_workers
        if tokenizer is None:
            tokenizer = CharTokenizer()
        self.tokenizer_name = tokenizer if isinstance(tokenizer, str) else type(tokenizer).__name__
        self.encoder = Encoder(
            load_tokenizer(tokenizer, download) if isinstance(tokenizer, str) else tokenizer, template, chat
        )
        self._domains = domains if task == "files" else self._expand("domains", domains, None)
        self.train_domain_names = self._expand("train_domains", train_domains, [SOURCE])
        self.val_domain_names = self._expand("val_domains", val_domains, [SOURCE])
        self.first_batch = 0
        self.name: str = task if task == "files" else f"{task} ({self._recipe()})"

    @property
    def tokenizer(self) -> Any:
        """What makes tokens of text."""
        return self.encoder.tokenizer

    def _recipe(self) -> str:
        if self.task == "text":
            return f"pieces of {self.piece}"
        return f"{' '.join(self.arithmetic.operations)}, {len(str(self.arithmetic.bound)) - 1} digits"

    # --- domains

    def _natural(self) -> list[str]:
        """The domains that are no dialects."""
        return [SOURCE, *(CORPORA[1:] if self.task == "text" else ())]

    def _dialects(self) -> list[str]:
        return [] if self.task == "files" else [*(dialects.ARITHMETIC if self.task == "arithmetic" else dialects.TEXT)]

    def _expand(self, option: str, names: list[str] | None, default: list[str] | None) -> list[str]:
        """Names of domains, with groups written out."""
        natural, every = self._natural(), self._dialects()
        held_out = [name for name in every if name in dialects.HELD_OUT[self.task]]
        reported = [*natural[1:], *(name for name in every if name not in held_out)]
        groups = {"reported": reported, "held_out": held_out}
        check_names(option, names)
        names = names if names is not None else default if default is not None else ["reported"]
        expanded = list[str]()
        for name in names:
            dialect, level = (name, None) if name in natural else split_severity(name)
            if dialect not in (allowed := [*natural, *every, *groups] if level is None else every):
                raise ConfigError(
                    f"{option}: task={self.task!r} has no domain {name!r}.{did_you_mean(dialect, allowed)} Known: "
                    f"{', '.join([*natural, *every, *groups])}; NAME@2 is a dialect at severity 2."
                )
            expanded += groups.get(name, [name])
        if not expanded or len(set(expanded)) < len(expanded):
            raise ConfigError(f"{option} must be a list of names, each once and at least one; got {names!r}.")
        return expanded

    @cached_property
    def domain_names(self) -> list[str]:
        """Names of the domains whose test prompts make the stream; of ``files`` they are read for it."""
        if self._domains is not None and self.task != "files":
            return self._domains
        known = list(dict.fromkeys(prompt.domain for prompt in self._test_prompts))
        for name in self._domains or ():
            if name not in known:
                raise ConfigError(
                    f"domains: the files have no domain {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}."
                )
        return self._domains or known

    @cached_property
    def _test_prompts(self) -> list[Prompt]:
        if not self.files:
            raise ConfigError("There are no test prompts: name them with files, --data.files [test.jsonl].")
        return [prompt for path in self.files for prompt in read_jsonl(path, self.keys, self.checker)]

    @cached_property
    def _train_prompts(self) -> list[Prompt]:
        if not self.train_files:
            raise ConfigError("There are no training prompts: name them with --data.train_files [train.jsonl].")
        return [prompt for path in self.train_files for prompt in read_jsonl(path, self.keys, self.checker)]

    def prompts(self, split: Split, domain: str = SOURCE) -> list[Prompt]:
        """All prompts of a split in a domain, before ``classes`` and ``num_prompts``.

        Args:
            split: ``train``, ``val`` or ``test``.
            domain: A domain of the task.
        """
        if self.task == "files":
            if split == "test":
                return [prompt for prompt in self._test_prompts if prompt.domain == domain]
            held_out = set(permutation(len(every := self._train_prompts), self.seed)[: round(VALIDATION * len(every))])
            return [prompt for n, prompt in enumerate(every) if (n in held_out) == (split == "val")]
        dialect, level = split_severity(domain) if domain not in self._natural() else (None, None)
        severity = level or self.severity
        if self.task == "arithmetic":
            return self.arithmetic.prompts(split, dialect, severity, domain)
        corpus = domain if domain in CORPORA else CORPORA[0]
        pieces = cut(read_corpus(corpus), self.piece)
        if corpus == CORPORA[0]:
            order = permutation(len(pieces), self.seed).tolist()
            ends = [round(share * len(order)) for share in (SHARES["train"], SHARES["train"] + SHARES["val"])]
            parts = {"train": order[: ends[0]], "val": order[ends[0] : ends[1]], "test": order[ends[1] :]}
            pieces = [pieces[n] for n in parts[split]]
        if dialect is not None:
            pieces = [dialects.rewrite(text, dialect, severity, self.seed, n) for n, text in enumerate(pieces)]
        return [Prompt(text, domain=domain, index=n) for n, text in enumerate(pieces)]

    @cached_property
    def domain_prompts(self) -> list[list[Prompt]]:
        """The prompts of each of :attr:`domain_names`.

        Raises:
            ConfigError: If ``classes`` leaves none of a domain.
        """
        return [self._chosen("test", name) for name in self.domain_names]

    def _chosen(self, split: Split, domain: str) -> list[Prompt]:
        every = self.prompts(split, domain)
        if self.classes is None:
            chosen = every
        else:
            chosen = [prompt for prompt in every if self.class_of(prompt.answer) in self.classes]
            if not chosen:
                known = sorted({self.class_of(prompt.answer) for prompt in every})[:20]
                raise ConfigError(
                    f"classes={self.classes} leaves no prompt of domain {domain!r}. Its classes by {self.classes_by}: "
                    f"{', '.join(map(repr, known))}."
                )
        return [chosen[n] for n in subset(len(chosen), self.num_prompts).tolist()]

    def class_of(self, answer: str) -> str:
        """The class of an answer."""
        return CLASSES[self.classes_by](answer)

    @cached_property
    def answer_classes(self) -> list[str]:
        """The classes of the stream's answers, sorted."""
        return sorted({self.class_of(prompt.answer) for prompts in self.domain_prompts for prompt in prompts})

    @cached_property
    def labels(self) -> list[Tensor]:
        """The class of each answer, a position in :attr:`answer_classes`, int64 (N_d,) for each domain."""
        number = {name: n for n, name in enumerate(self.answer_classes)}
        return [torch.tensor([number[self.class_of(p.answer)] for p in prompts]) for prompts in self.domain_prompts]

    # --- the stream

    @property
    def has_answers(self) -> bool:
        """Whether any prompt of the stream has an answer: without, nothing is said of accuracy."""
        return any(prompt.answer for prompts in self.domain_prompts for prompt in prompts)

    @cached_property
    def stream(self) -> Stream:
        """The batches of the whole stream, as positions of prompts.

        Raises:
            ConfigError: If it sorts by answers, and there are none.
        """
        if streams.orders_by_labels(self.stream_kind, self.stream_options["dirichlet"]) and not self.has_answers:
            raise ConfigError(
                f"stream={self.stream_kind!r} orders prompts by their answers, and these have none. Choose iid, "
                "continual, mixed, ordered or recurring, without dirichlet."
            )
        kind, options = self.stream_kind, self.stream_options
        return build_stream(self.labels, kind=kind, batch_size=self.batch_size, seed=self.order_seed, **options)

    @property
    def _visits(self) -> int:
        return int(self.stream_options["visits"] or 1)

    @property
    def stream_domains(self) -> list[str]:
        """Names of the domains in the order of the stream's ``domain`` numbers; ``recurring``: for each visit."""
        if self.stream_kind != "recurring":
            return list(self.domain_names)
        return [f"{name}{VISIT}{visit}" for visit in range(1, self._visits + 1) for name in self.domain_names]

    @property
    def spans_domains(self) -> bool:
        """Whether batches may have prompts of several domains."""
        return streams.spans_domains(self.stream_kind, self.stream_options)

    @cached_property
    def _stream_prompts(self) -> tuple[list[Prompt], list[int]]:
        """All prompts of the stream by ``index``, and the number of the domain of each."""
        domains = self.domain_prompts * self._visits
        joined = [prompt for prompts in domains for prompt in prompts]
        return joined, [number for number, prompts in enumerate(domains) for _ in prompts]

    def prompt_of(self, index: int) -> Prompt:
        """The prompt of the stream with this ``index``."""
        return self._stream_prompts[0][index]

    def start_at(self, batch: int) -> None:
        """Let :meth:`predict_dataloader` start at this batch: above 0 where a run is continued."""
        self.first_batch = batch

    # --- loaders

    def _loader(self, dataset: Any, **options: Any) -> DataLoader[TokenBatch]:
        return DataLoader(dataset, collate_fn=already_collated, num_workers=self.num_workers, **options)

    def _answered(self, split: Split, names: Sequence[str]) -> AnsweredBatches:
        of_files = self.task == "files" and split != "test"
        each = [self.prompts(split)] if of_files else [self._chosen(split, name) for name in names]
        prompts = [prompt for domain in each for prompt in domain]
        return AnsweredBatches(prompts, [n for n, domain in enumerate(each) for _ in domain], self.encoder)

    def train_dataloader(self) -> DataLoader[TokenBatch]:
        """Shuffled; a smaller last batch is left out."""
        dataset, size = self._answered("train", self.train_domain_names), self.train_batch_size
        sampler = samplers.make_train_sampler(len(dataset))
        return self._loader(dataset, batch_size=size, sampler=sampler, drop_last=len(sampler) > size)

    def source_batches(
        self, num_prompts: int | None = None, batch_size: int | None = None, seed: int = 0
    ) -> DataLoader[TokenBatch]:
        """Training prompts with answers, for a method's ``prepare``; can be iterated more than once.

        Args:
            num_prompts: At most this many, a random choice; by default all.
            batch_size: Prompts in a batch; by default as in the stream.
            seed: Seed of the choice and the order.

        Returns:
            Batches as those of :meth:`train_dataloader`, the same in each iteration.

        Raises:
            ConfigError: If ``files`` have no training prompts.
        """
        if num_prompts is not None:
            check_range("num_prompts", num_prompts, 1, integer=True)
        dataset = self._answered("train", self.train_domain_names)
        order = torch.from_numpy(permutation(len(dataset), seed)[:num_prompts])
        batches = [batch.tolist() for batch in torch.split(order, batch_size or self.batch_size)]
        return self._loader(dataset, batch_sampler=StreamSampler(batches))

    def _evaluation(self, split: Split, names: Sequence[str]) -> DataLoader[TokenBatch]:
        """Batches of one domain each."""
        dataset = self._answered(split, names)
        numbers = torch.tensor(dataset.domains)
        batches = samplers.validation_batches(
            [numbers[numbers == n] for n in torch.unique(numbers)], self.train_batch_size
        )
        return self._loader(dataset, batch_sampler=StreamSampler(batches))

    def val_dataloader(self) -> DataLoader[TokenBatch]:
        """Validation prompts with answers, of ``val_domains``."""
        return self._evaluation("val", self.val_domain_names)

    def test_dataloader(self) -> DataLoader[TokenBatch]:
        """Test prompts with answers, of ``domains``."""
        return self._evaluation("test", self.domain_names)

    def predict_dataloader(self) -> DataLoader[TokenBatch]:
        """The batches of the stream."""
        sampler = StreamSampler(self.stream.batches[self.first_batch :])
        return self._loader(PromptBatches(*self._stream_prompts, self.encoder), batch_sampler=sampler)

    # --- the protocol

    def digest(self) -> str:
        """First 12 hexadecimal digits of the SHA-256 of the test prompts, before they are shifted, for the protocol."""
        every = self._test_prompts if self.task == "files" else self.prompts("test")
        return _digest(tuple(every))

    def preprocessing(self) -> dict[str, Any]:
        """What happens to a prompt before the net, for the protocol: tokenizer, template, chat template."""
        characters = {"characters": self.tokenizer.characters} if isinstance(self.tokenizer, CharTokenizer) else {}
        frame = {"template": self.encoder.template, "chat": self.encoder.chat}
        return {"tokenizer": self.tokenizer_name, **characters, **frame}

    def describe(self) -> dict[str, Any]:
        """What the stream consists of, in primitives, for :class:`~lightning_tta.data.protocol.Protocol`.

        ``images`` are prompts. Where ``classes`` leaves prompts out, the name of the data says so.
        """
        counts = [len(prompts) for prompts in self.domain_prompts] * self._visits
        shifted = [name for name in self.domain_names if name not in self._natural()] if self.task != "files" else []
        only = "" if self.classes is None else f", only {self.classes_by} in {sorted(self.classes)}"
        by_class = streams.orders_by_labels(self.stream_kind, self.stream_options["dirichlet"])
        return {
            "data": f"{self.name}{only}" + (f", classes by {self.classes_by}" if by_class and not only else ""),
            "data_digest": self.digest(),
            "split": "test",
            "domains": self.stream_domains,
            "images": sum(counts),
            "images_per_domain": counts,
            "function_set": f"dialects {dialects.VERSION}" if shifted else None,
            "severity": self.severity if any(split_severity(name)[1] is None for name in shifted) else None,
            "corruption_seed": self.seed if shifted else None,
            "stream": self.stream_kind,
            "order_seed": self.order_seed,
            "batch_size": self.batch_size,
            **self.stream_options,
        }


@lru_cache(maxsize=8)
def _digest(prompts: tuple[Prompt, ...]) -> str:
    content = hashlib.sha256()
    for prompt in prompts:
        content.update(repr((prompt.prompt, prompt.answer, prompt.checker, prompt.domain)).encode())
    return content.hexdigest()[:12]
