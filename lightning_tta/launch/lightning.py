"""From a configuration to a run: LightningCLI's fit, validate, test and predict with this package's defaults."""

from __future__ import annotations

import argparse
import json
import pydoc
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import DefaultHelpFormatter, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch import nn

from lightning_tta.backbones.weights import read_checkpoint
from lightning_tta.errors import ConfigError, LightningTTAError
from lightning_tta.launch.ending import (
    end_with_parent,
    interruptible,
    remove_empty_parameters,
    say_where_run_is,
    say_where_weights_are,
)
from lightning_tta.launch.help import short_help
from lightning_tta.launch.messages import explain, missing_package, name_option
from lightning_tta.launch.method_names import name_in, name_in_arguments
from lightning_tta.launch.noise import without_noise
from lightning_tta.launch.trust import MODE, check_classes, close_parsers
from lightning_tta.methods import available_methods, find
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.components.additions import ADDITIONS, check
from lightning_tta.methods.tent import Tent
from lightning_tta.modules.training import find_checkpoint
from lightning_tta.run.bar import RunBar
from lightning_tta.run.board import FitBoard
from lightning_tta.run.options import PARTS, RunConfig, check_precisions
from lightning_tta.run.progress import FitProgress

READABLE = 40
"""So many subclasses are listed in help and comments; ``torch.nn.Module`` has a thousand."""


class _ShortLists(DefaultHelpFormatter):
    """Counts known subclasses where they are too many to read."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = super()._get_help_string(action)
        head, _, names = text.partition(", known subclasses: ")
        count = names.count(",") + 1
        return text if count <= READABLE else f"{head}, {count} known subclasses)"


class TTACLI(LightningCLI):
    """LightningCLI with this package's defaults and checks.

    Args:
        only: The one subcommand that gets a parser; to build one takes a tenth of a second. ``None``: all.
    """

    def __init__(self, *args: Any, only: str | None = None, **kwargs: Any) -> None:
        self._only = only
        super().__init__(*args, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # static above
        """The subcommands, with the arguments that they do not take."""
        every = LightningCLI.subcommands()
        return every if self._only is None else {self._only: every[self._only]}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser whose help, and the comments of ``--print_config=comments``, can be read."""
        return super().init_parser(formatter_class=_ShortLists, parser_mode=MODE, **kwargs)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.set_defaults(return_predictions=False)  # else all outputs of the stream are kept in memory
            parser.set_defaults({"model": {"class_path": "lightning_tta.TestTimeAdaptation"}})
            for name, kind in PARTS.items():  # --state.save_every and so on
                parser.add_lightning_class_args(kind, name)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments, or show the short help; say in short what does not parse."""
        self._args: list[str] = args if isinstance(args, list) else []
        name = args["subcommand"] if isinstance(args, dict) else "".join(args[:1])
        command = self._subcommand_parsers.get(name, parser)
        if isinstance(args, list) and {"-h", "--help"} & set(args):
            if command is not parser and args[-1] != "all":
                print(short_help(name, command))
                raise SystemExit(0)
            args = [name, "--help"]
        for each in (parser, *self._subcommand_parsers.values()):
            each.exit_on_error = False
        try:
            super().parse_arguments(parser, _name_classes(args))
        except argparse.ArgumentError as error:
            raise explain(error, command, f"lightning-tta {name}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"A file of the configuration is no UTF-8 text: {error}. Give a YAML file.") from error
        check_classes(self.config[name])
        options = (self.config[name].get("model") or {}).get("init_args") or {}
        check_precisions(options.get("precision"), self.config[name].get("trainer.precision"))
        try:
            _check_additions(options)
        except ConfigError as error:
            raise name_option(error, self.config[name]) from None

    def _dump_config(self) -> None:
        """The configuration as data, of which modules take their hyper-parameters; it is checked when it is parsed."""
        if not hasattr(self, "config_dump"):
            text = self.parser.dump(self.config, skip_link_targets=False, skip_none=False, skip_validation=True)
            self.config_dump = yaml.safe_load(text)[self.config["subcommand"]]

    def before_instantiate_classes(self) -> None:
        """A net of the user's that is written as a class with its arguments is built as one that is named by its path.

        So a checkpoint can say which net it is of, and the weights are asked for. One whose arguments no checkpoint
        can hold, such as a class of blocks, is built as it is written.
        """
        model = self.config[self.config["subcommand"]].get("model") or {}
        options = model.get("init_args") or {}
        net = options.get("backbone")
        given = net.init_args.as_dict() if isinstance(net, Namespace) and "init_args" in net else {}
        if isinstance(net, Namespace) and "class_path" in net and _is_data(given):
            classes = given.pop("num_classes", None)
            if options.get("num_classes") in (None, 10):  # as by default
                options["num_classes"] = classes or options.get("num_classes")
            options["backbone"] = net["class_path"]
            options["backbone_options"] = {**given, **(options.get("backbone_options") or {})} or None

    def instantiate_classes(self) -> None:
        """The model, the data and the Trainer; an error names the option."""
        try:
            with _in_our_words():
                super().instantiate_classes()
        except ConfigError as error:
            raise name_option(error, self.config[self.config["subcommand"]]) from error

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """The Trainer, with this package's bar where the configuration has no other one."""
        chosen = config.get("callbacks") or []
        has_bar = any(isinstance(each, ProgressBar) for each in (chosen if isinstance(chosen, list) else [chosen]))
        if config.get("enable_progress_bar") is not False and not has_bar:
            callbacks = [*callbacks, RunBar()]
        return super()._instantiate_trainer(config, callbacks)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer; what it does not accept is the configuration's fault."""
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, TypeError, ValueError) as error:
            text = " ".join(str(error).split())
            raise ConfigError(f"The Trainer refuses its options: {text} Change what --trainer sets.") from error

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the command, and say how it ended."""
        end_with_parent(self.trainer)
        with interruptible(subcommand, self.trainer, self.model):
            super()._run_subcommand(subcommand)
        remove_empty_parameters(self.trainer)
        if not self.trainer.is_global_zero or self.trainer.progress_bar_callback is None:  # a quiet run
            return
        if subcommand == "fit":
            say_where_weights_are(self.trainer, self._args, self.config["fit"]["data"]["class_path"])
        elif subcommand == "predict":
            say_where_run_is(self.model)

    def _parse_ckpt_path(self) -> None:
        """Check ``--ckpt_path`` instead of merging its hyper-parameters, which replaces the model asked for."""
        config = self.config[self.config["subcommand"]]
        path = config.get("ckpt_path")
        if path is not None and Path(path).is_dir():
            path = config["ckpt_path"] = str(self._find_checkpoint(Path(path)))
        if path is None or not Path(path).is_file():
            if path is not None and str(path) not in ("best", "last", "hpc", "registry"):
                raise ConfigError(f"--ckpt_path {path}: no such file.")
            return
        saved = read_checkpoint(path)
        wanted = config["model"]["class_path"].rpartition(".")[2]
        ours = saved.get("lightning_tta", {}) if isinstance(saved, dict) else {}
        written_by = ours.get("class", "a class of another package")
        if written_by != wanted:
            weights = (
                "--model.weights" if wanted in ("SourceClassifier", "SourceLanguageModel") else "--model.source_ckpt"
            )
            remedy = f"Weights to begin with go to {weights}."
            raise ConfigError(
                f"--ckpt_path {path} was written by {written_by}, but the model is {wanted}. --ckpt_path resumes a run "
                f"of the same class. {remedy}"
            )

    def _find_checkpoint(self, folder: Path) -> Path:
        """The checkpoint that a folder stands for: the last one to go on with ``fit``, else the best one."""
        if self.config["subcommand"] != "fit":
            return find_checkpoint(folder, "--ckpt_path")
        last = max(folder.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime, default=None)
        if last is None:
            raise ConfigError(
                f"--ckpt_path {folder}: no last.ckpt in or below this folder to go on from. Name the file of a "
                "checkpoint, or leave --ckpt_path out to start anew."
            )
        return last


class _BuildOnlyCLI(TTACLI):
    """Builds module, data and Trainer, and runs nothing."""

    def _run_subcommand(self, subcommand: str) -> None: ...


class _ParseOnlyCLI(TTACLI):
    """Stops after the checks of the parser: no net is built, no data read."""

    def _set_seed(self) -> None: ...

    def instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...


def run_lightning(args: list[str] | dict[str, Any], *, parse_only: bool = False, build_only: bool = False) -> TTACLI:
    """Run fit, validate, test or predict.

    Args:
        args: As on the command line, or a nested dict with ``subcommand``.
        parse_only: Only check the configuration.
        build_only: Only build what it describes.

    Raises:
        LightningTTAError: If the arguments do not parse, or the configuration, data or weights are wrong.
    """
    close_parsers()
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a user's own classes, as ``python -m`` finds them
    available_methods()  # a configuration may name any of them by its class alone
    name = args["subcommand"] if isinstance(args, dict) else "".join(args[:1])
    with without_noise(), _in_our_words():
        return (_ParseOnlyCLI if parse_only else _BuildOnlyCLI if build_only else TTACLI)(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=RunConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            trainer_defaults={
                "inference_mode": False,
                "use_distributed_sampler": False,
                "default_root_dir": "runs",
                "callbacks": [FitBoard(), FitProgress()],
            },
            args=args,
            only=name if name in LightningCLI.subcommands() and not parse_only else None,  # the latter serves others
        )


def check_configurations(every: Iterable[list[str] | dict[str, Any]]) -> Iterator[Namespace]:
    """Parse what :func:`run_lightning` takes, with one parser for all: to build it takes a third of a second.

    Yields:
        The configuration of each, without running it.

    Raises:
        ConfigError: If one does not parse.
    """
    cli = None
    for args in every:
        if cli is None:
            cli = run_lightning(args, parse_only=True)
        else:
            with without_noise(), _in_our_words():
                cli.parse_arguments(cli.parser, args)
        yield cli.config[cli.config["subcommand"]]


@contextmanager
def _in_our_words() -> Iterator[None]:
    """An error of ours that jsonargparse has wrapped is raised as it was; others of the configuration become ours."""
    try:
        yield
    except (ValueError, TypeError, ModuleNotFoundError, MisconfigurationException) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, (LightningTTAError, ModuleNotFoundError)):
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, LightningTTAError):
            raise cause from None
        if isinstance(cause, ModuleNotFoundError):
            raise missing_package(cause) from error
        if isinstance(error, MisconfigurationException):
            raise ConfigError(f"Lightning refuses this configuration: {' '.join(str(error).split())}") from error
        raise


def build_method(config: Path) -> TTAMethod:
    """The method around its net that ``predict`` would have with this configuration file.

    Raises:
        LightningTTAError: If the configuration is none of a predict run, or the net cannot be made.
    """
    method = getattr(run_lightning(["predict", f"--config={config}"], build_only=True).model, "method", None)
    if not isinstance(method, TTAMethod):
        raise ConfigError(f"{config} is no configuration of a predict run.")
    return method


def build_data(args: list[str]) -> LightningDataModule:
    """The data module that ``predict`` would have with these arguments.

    Raises:
        LightningTTAError: If the arguments do not parse, name no data, or the data module refuses them.
    """
    (config,) = check_configurations([["predict", "--model.method=source", *args]])
    if config["data"] is None:
        raise ConfigError("No data. Give --data CLASS, such as --data DigitsData, or a --config that has it.")
    return pydoc.locate(config["data"]["class_path"])(**config["data"]["init_args"].as_dict())  # type: ignore[operator, no-any-return]


def _name_classes(args: Any) -> Any:
    """The arguments with ``--model.method tent`` as ``--model.method lightning_tta.methods.Tent``, dicts alike."""
    return name_in(args) if isinstance(args, dict) else name_in_arguments(args)


def _check_additions(options: Mapping[str, Any]) -> None:
    """Refuse wrong values of what every method can take beside its own options, before weights are loaded."""
    wanted = {name: options[name] for name in ADDITIONS if options.get(name) is not None}
    if wanted and "method" in options:  # and not a module of the user's, which has options of its own
        check([_maker(options.get("method")), Tent], **wanted)


def _maker(method: Any) -> Callable[[nn.Module], TTAMethod]:
    """What makes the method of a configuration; Tent in place of a class of the user's, which may do anything."""
    path = method.get("class_path", "") if isinstance(method, Namespace) else ""
    if not path.startswith("lightning_tta.methods."):
        return Tent
    options = method.get("init_args")
    return partial(find(path.rpartition(".")[2]), **(options.as_dict() if options else {}))


def _is_data(arguments: dict[str, Any]) -> bool:
    try:
        json.dumps(arguments)
    except TypeError:
        return False
    return True
