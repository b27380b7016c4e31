"""Adapted nets as plain files, that work without this package."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from lightning_tta._version import __version__
from lightning_tta.backbones import Backbone
from lightning_tta.backbones.split import as_logits, keep_classes
from lightning_tta.backbones.weights import digest_of
from lightning_tta.errors import ConfigError, DataError, UnsupportedModelError, check_choice
from lightning_tta.exported_step import DECOMPOSITIONS, ExportedStep, translations
from lightning_tta.files import of_all, of_process, write_whole
from lightning_tta.losses import at_least_float32
from lightning_tta.methods import create_method, names
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.selection import Choice
from lightning_tta.methods.base.state import put_back
from lightning_tta.methods.base.task import float_dtype
from lightning_tta.methods.components.adapters import given_state
from lightning_tta.modules.loading import load_source
from lightning_tta.onnx_adapter import AFTER, BEFORE, OnnxAdapter
from lightning_tta.run.directory import FINAL, FORMAT, REPORT, STATE, State, read_state

Format = Literal["safetensors", "pt", "pt2", "onnx"]
FORMATS: dict[str, Format] = {
    ".safetensors": "safetensors",
    ".pt": "pt",
    ".pth": "pt",
    ".pt2": "pt2",
    ".onnx": "onnx",
}
"""By the file's suffix."""
BATCHES = (2, 1, 3)  # a program must take any; it is made from the first
TOLERANCE, HALF_TOLERANCE = 1e-4, 3e-2
"""Largest difference between the logits of a program and of the method, as a share of the largest logit."""


def save(
    method: TTAMethod,
    path: str | Path,
    *,
    format: Format | None = None,
    images: Tensor | None = None,
    class_names: list[str] | None = None,
    stream: Mapping[str, Any] | None = None,
    adapting: bool = False,
) -> Path:
    """Write the plain net that predicts as ``method.predict`` does now: ``method.export()`` as a file.

    - ``safetensors``: the state dict of the user's own net, for ``net.load_state_dict(load_file(path))`` with
      ``safetensors.torch.load_file``. Of a :class:`~lightning_tta.Backbone` that of the net inside; its mean and std
      are in the metadata, with the method, its options, the class names and the stream.
    - ``pt``: the same state dict by ``torch.save``, for ``torch.load(path, weights_only=True)``; no metadata.
    - ``pt2``: a program for ``torch.export.load(path).module()``: pixels in [0, 1], any batch size -> logits.
    - ``onnx``: the same for ONNX, input ``images``, output ``logits``. Needs ``pip install 'lightning-tta[onnx]'``.

    A program has the normalisation of a Backbone inside. It is run on batches of 1 to 3 images after it was written,
    and compared with the method.

    With ``adapting``, a program goes on adapting without torch: the step of a method without gradients, whose state
    comes in and goes out. An ``onnx`` file has the inputs ``images`` and ``state.NAME``, the outputs ``logits`` and
    ``next.NAME``; an input of state that is left out has the value that the method has now.
    :class:`~lightning_tta.OnnxAdapter` hands the state on. A ``pt2`` program takes ``(images, {NAME: tensor})`` and
    returns the same of logits and new state. Images are not looked at: those with pixels that are not finite must be
    left out before.

    Args:
        method: A method that has seen its stream.
        path: The file.
        format: One of the above; ``None``: by the suffix ``.safetensors``, ``.pt``, ``.pth``, ``.pt2`` or ``.onnx``.
        images: (B, C, H, W), pixels in [0, 1], an example for programs; ``None``: noise of the size of the last batch.
        class_names: Of the logits, in order, for the metadata.
        stream: What the method has seen, in primitives, for the metadata.
        adapting: Whether the program goes on adapting.

    Returns:
        The path.

    Raises:
        ConfigError: If the suffix is unknown, no batch was seen, or a package is missing.
        UnsupportedModelError: If no plain net predicts as the method does, or it cannot become a program.
    """
    path = Path(path)
    if format is None and path.suffix not in FORMATS:
        raise ConfigError(
            f"The file's suffix says its format: {', '.join(FORMATS)}; got {str(path)!r}. Or give format=."
        )
    kind = FORMATS[path.suffix] if format is None else format
    check_choice("format", kind, tuple(dict.fromkeys(FORMATS.values())))
    if not isinstance(getattr(method, "method", method), TTAMethod):  # a watch has its method
        raise ConfigError(
            f"save() writes the net of a method, lightning_tta.adapt(net, ...); got a {type(method).__name__}."
        )
    if adapting:
        return _save_adapting(method, path, kind, images, class_names, stream)
    net = method.export().cpu()
    metadata = _metadata(method, net, class_names, stream)
    if kind in ("safetensors", "pt"):
        weights = _weights(net.net if isinstance(net, Backbone) else net)
        content = to_safetensors(weights, metadata) if kind == "safetensors" else None
        write = (lambda file: torch.save(weights, file)) if content is None else (lambda file: file.write(content))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, write)
        return path
    examples = _examples(method, net, images)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _explained(net, kind), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter, which speak of its own code
        (_write_program if kind == "pt2" else _write_onnx)(path, _Pixels(net).eval(), examples, metadata, method)
    return path


export = save


def _save_adapting(
    method: TTAMethod,
    path: Path,
    kind: Format,
    images: Tensor | None,
    class_names: list[str] | None,
    stream: Mapping[str, Any] | None,
) -> Path:
    if kind not in ("pt2", "onnx"):
        raise ConfigError(
            f"adapting=True writes a program, {path.stem}.onnx or {path.stem}.pt2; {kind!r} holds weights alone."
        )
    method = getattr(method, "method", method)
    examples = _examples(method, method.model, images)
    metadata = {**_metadata(method, method.model, class_names, stream), "adapting": "true"}
    path.parent.mkdir(parents=True, exist_ok=True)
    with _explained(method.model, kind), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter, which speak of its own code
        step = ExportedStep(method, examples[0])
        program = step.export(examples[0])
        if kind == "pt2":
            run = program.module()
            _check_stream(lambda images, state: run(images, state), step, method, examples, path)
            files = {"metadata.json": json.dumps(metadata)}
            write_whole(path, lambda file: torch.export.save(program, file, extra_files=files))
            return path
        names = list(step.state)
        program = program.run_decompositions({**DECOMPOSITIONS})  # its own copy
        content = _onnx_content(
            program,
            (),
            metadata,
            inputs=["images", *(f"{BEFORE}{name}" for name in names)],
            outputs=["logits", *(f"{AFTER}{name}" for name in names)],
            values={f"{BEFORE}{name}": tensor for name, tensor in step.state.items()},
        )
        adapter = OnnxAdapter(content)

        def adapt(images: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            logits = torch.from_numpy(adapter(images.numpy()))
            return logits, {name: torch.from_numpy(adapter.state[f"{BEFORE}{name}"]) for name in state}

        _check_stream(adapt, step, method, examples, path)
        write_whole(path, lambda file: file.write(content))
    return path


def _check_stream(
    run: Callable[[Tensor, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]],
    step: ExportedStep,
    method: TTAMethod,
    examples: list[Tensor],
    path: Path,
) -> None:
    """Refuse a program that, over several batches, does not adapt as the method does."""
    twin = copy.deepcopy(method).cpu()
    state = {name: tensor.clone() for name, tensor in step.state.items()}
    tolerance = TOLERANCE if step.dtype.itemsize >= 4 else HALF_TOLERANCE
    for images in examples:
        logits, state = run(images, state)
        expected = {"": twin(images), **{name: value for name, value in {**twin.adaptable, **twin.rest}.items()}}
        for name, value in {"": logits, **state}.items():
            wanted = expected[name].detach()
            same = value.shape == wanted.shape
            scale = wanted.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
            distance = (value.double() - wanted.double()).abs().max() / scale if same else torch.tensor(torch.inf)
            if not bool(distance <= tolerance):
                what = f"state {name!r}" if name else "logits"
                raise UnsupportedModelError(
                    f"The program for {path.name} does not adapt as the method does: {what} "
                    f"after {len(images)} images differ by {float(distance):.2g} of the largest one, allowed is "
                    f"{tolerance:.0e}. Nothing was written. Save the plain net, without adapting."
                )


def _metadata(
    method: TTAMethod, net: nn.Module, class_names: list[str] | None, stream: Mapping[str, Any] | None
) -> dict[str, str]:
    entries: dict[str, Any] = {"options": method.options, "class_names": class_names, "stream": stream}
    if isinstance(net, Backbone):
        entries |= {"mean": net.preprocessing["mean"], "std": net.preprocessing["std"], "net": net.name}
    texts = {name: json.dumps(value, sort_keys=True) for name, value in entries.items() if value is not None}
    return {"lightning_tta": __version__, "method": method.name, **texts}


def _weights(net: nn.Module) -> dict[str, Tensor]:
    """Its state dict, each tensor apart, also where several are one."""
    others = [name for name, value in net.state_dict().items() if not isinstance(value, Tensor)]
    if others:
        raise UnsupportedModelError(
            f"The state dict of {type(net).__name__} holds more than tensors ({', '.join(others[:3])}), which no file "
            "of weights can hold. Save a program (.pt2, .onnx), or method.export() with torch.save."
        )
    return {name: value.detach().contiguous().clone() for name, value in net.state_dict().items()}


# Programs


class _Pixels(nn.Module):
    """The net as a method runs it: pixels of any precision -> logits, at least float32."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.dtype = net, float_dtype(net)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K)."""
        return at_least_float32(as_logits(self.net(images.to(self.dtype))))


def _examples(method: TTAMethod, net: nn.Module, images: Tensor | None) -> list[Tensor]:
    """Batches to make and to check a program with, on the CPU."""
    shape = method.image_shape
    if shape is None and isinstance(net, Backbone):
        shape = net.preprocessing["input_size"]
    if images is None and shape is None:
        raise ConfigError("The size of the images is not known. Give an example: images=, (B, C, H, W) in [0, 1].")
    if images is None:
        images = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))  # type: ignore[misc]
    images = images.detach().cpu()
    return [images[torch.arange(size) % len(images)] for size in BATCHES]


@contextmanager
def _explained(net: nn.Module, kind: str) -> Iterator[None]:
    """What torch cannot export becomes an error of one line."""
    try:
        yield
    except (ConfigError, UnsupportedModelError):
        raise
    except Exception as error:
        first: BaseException = error  # torch wraps what is wrong in a page of advice
        while first.__cause__ is not None:
            first = first.__cause__
        lines = [line.strip() for line in str(first).splitlines() if line.strip()]
        reason = " ".join([f"{type(first).__name__}:", *lines[:1]])[:300].rstrip(".:") + "."
        other = "'.pt2' or '.safetensors'" if kind == "onnx" else "'.safetensors'"
        raise UnsupportedModelError(
            f"{type(net).__name__} cannot be written as {kind}: {reason} Save weights or "
            f"another format ({other}), or change what torch names."
        ) from error


def _check(found: list[Tensor], examples: list[Tensor], method: TTAMethod, path: Path) -> None:
    """Refuse a program that does not predict as the method does."""
    device = next((p.device for p in method.model.parameters()), torch.device("cpu"))
    tolerance = TOLERANCE if float_dtype(method.model).itemsize >= 4 else HALF_TOLERANCE
    for logits, images in zip(found, examples, strict=True):
        expected = method.predict(images.to(device)).cpu()
        same_shape = logits.shape == expected.shape
        distance = (logits - expected).abs().max() / expected.abs().max() if same_shape else torch.tensor(torch.inf)
        if not bool(distance <= tolerance):
            raise UnsupportedModelError(
                f"The program for {path.name} does not predict as the method does: on {len(images)} images its logits "
                f"differ by {float(distance):.2g} of the largest one, allowed is {tolerance:.0e}. Nothing was written. "
                "Does the net do something else in each call, or depend on the batch?"
            )


@torch.no_grad()
def _write_program(
    path: Path, net: nn.Module, examples: list[Tensor], metadata: Mapping[str, str], method: TTAMethod
) -> None:
    net.requires_grad_(False)
    program = torch.export.export(net, (examples[0],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    run = program.module()
    _check([run(images) for images in examples], examples, method, path)
    files = {"metadata.json": json.dumps(metadata)}
    write_whole(path, lambda file: torch.export.save(program, file, extra_files=files))


@torch.no_grad()
def _write_onnx(
    path: Path, net: nn.Module, examples: list[Tensor], metadata: Mapping[str, str], method: TTAMethod
) -> None:
    net.requires_grad_(False)
    content = _onnx_content(net, (examples[0],), metadata, inputs=["images"], outputs=["logits"])
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    found = [torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0]) for images in examples]
    _check(found, examples, method, path)
    write_whole(path, lambda file: file.write(content))


def _onnx_content(
    net: nn.Module | torch.export.ExportedProgram,
    example: tuple[Tensor, ...],
    metadata: Mapping[str, str],
    *,
    inputs: list[str],
    outputs: list[str],
    values: Mapping[str, Tensor] | None = None,
) -> bytes:
    """An ONNX file; inputs that have ``values`` may be left out."""
    try:
        import onnx
        import onnxruntime  # noqa: F401  # that runs it, to compare
        import onnxscript  # noqa: F401  # torch's exporter needs it
    except ImportError as error:
        raise ConfigError(f"ONNX files need the package {error.name!r}: pip install 'lightning-tta[onnx]'.") from error
    program = torch.onnx.export(
        net,
        example,
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},) if example else None,
        custom_translation_table=translations(),
        input_names=inputs,
        output_names=outputs,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, dict(metadata))
    for name, value in (values or {}).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value.numpy(), name))
    content: bytes = model.SerializeToString()
    return content


# Runs


def export_run(
    run: str | Path,
    output: str | Path = "adapted.safetensors",
    process: int | None = None,
    build: Callable[[Path], TTAMethod] | None = None,
    adapting: bool = False,
) -> Path:
    """Write the net of a predict run, at its end or, if it is unfinished, as last saved.

    Args:
        run: The run's directory, or the one above where there is only one in it.
        output: The file, whose suffix says the format: ``.safetensors``, ``.pt``, ``.pt2`` or ``.onnx``, see
            :func:`save`.
        process: Whose net, of a run of several processes: each of them has adapted a net of its own.
        build: Makes the run's method around its net, from the run's ``config.yaml``; asked where the run cannot say in
            words which net it was. A run in Python of a net of your own: ``build=lambda _: Tent(my_net)``, with the
            weights that it had.
        adapting: Write a program that goes on adapting (``.onnx`` or ``.pt2``; methods without gradients), and not the
            plain net.

    Raises:
        DataError: If the run has no state, or the weights that it adapted are no longer there.
        ConfigError: If it does not have the one net that was asked for, or nobody knows the net.
        UnsupportedModelError: If no plain net predicts as the method does.
    """
    run = _run_directory(Path(run))
    path = run / (FINAL if (run / REPORT).exists() else STATE)
    states = {file: state for file in of_all(path) if (state := read_state(file, head=True)) is not None}
    state = states.get(path if process is None else of_process(path, process))
    if state is None and process is None and len(states) == 1:
        (state,) = states.values()
    if state is None and states:
        raise ConfigError(f"Say which net of {run}: {'; '.join(_describe(*item) for item in states.items())}.")
    if state is None:
        raise DataError(
            f"{run} has no saved state ({FINAL}, or {STATE} of an unfinished run). Give the directory of a predict run "
            f"that is finished, or that was made with --state.save_every N. To "
            "make this one again with a state, repeat its command with --state.resume restart."
        )
    if state.get("format") != FORMAT:
        raise DataError(
            f"The state in {run} was written by version {state.get('version')} of lightning_tta, whose states cannot "
            "be read any more. Repeat the run with --state.resume restart."
        )
    method = _method_of(run, state, build)
    identity = state["identity"]
    stream = {name.removeprefix("protocol."): v for name, v in identity.items() if name.startswith("protocol.")}
    return save(method, output, class_names=state["class_names"], stream=stream, adapting=adapting)


def _method_of(run: Path, state: State, build: Callable[[Path], TTAMethod] | None) -> TTAMethod:
    """The method of a run, as it was when its state was saved."""
    identity, recipe, config = state["identity"], state["recipe"], run / "config.yaml"
    if recipe is not None and identity["method"] in names():
        net = load_source(**recipe)
        if state["classes"] is not None:
            keep_classes(net, state["classes"])
        _check_digest(run, net, identity)
        options = {
            name.removeprefix("method."): value for name, value in identity.items() if name.startswith("method.")
        }
        method = create_method(identity["method"], net, **options)
    elif build is not None:
        method = build(config)
        _check_digest(run, method.model, identity, method.choice)
    else:
        raise ConfigError(
            f"{run} adapted a net or a method of your own, which only you can make again: export_run(run, output, "
            "build=lambda _: Tent(my_net)), with the weights that the net had. After a run in Python: "
            "lightning_tta.save(module.method, output)."
        )
    if "moment" in state:
        put_back(method, state["moment"])
    else:
        method.load_state_dict(state["method"])
    method.image_shape = state["image_shape"]
    return method


def _check_digest(run: Path, net: nn.Module, identity: Mapping[str, Any], choice: Choice | None = None) -> None:
    wanted = identity["protocol.weights_digest"]
    if digest_of(given_state(net, choice)) != wanted:
        raise DataError(
            f"The source weights are no longer those that {run} adapted ({identity.get('protocol.weights')}, digest "
            f"{wanted}): its changes fit these alone. Put them back, or repeat the run. (Random weights are lost.)"
        )


def _run_directory(path: Path) -> Path:
    """The directory itself, or that of the only run below it with a saved state."""
    if any(of_all(path / name) for name in (STATE, FINAL)):
        return path
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder. Give the directory of a predict run.")
    runs = sorted({state.parent for pattern in ("state*.pt", "final_state*.pt") for state in path.rglob(pattern)})
    if len(runs) > 1:
        names = ", ".join(str(run.relative_to(path)) for run in runs)
        raise ConfigError(f"Say which run of {path}: {names} have saved their states.")
    return runs[0] if runs else path


def _describe(path: Path, state: State) -> str:
    """Which net a state has, and how to ask for it."""
    rank, domain = path.stem.partition(".rank")[2], state["position"][0]
    where = "as it began" if domain is None else f"last on '{state['domain_names'][domain]}'"
    return f"{path.name}, {where} ({f'--process {rank}' if rank else 'without --process'})"
