"""Adapted weights as plain files: for the plain net, without this package."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from lightning_tta._version import __version__
from lightning_tta.errors import ConfigError, DataError, check_choice
from lightning_tta.files import of_all, of_process, write_whole
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.run.directory import FINAL, STATE, State, read_state

Format = Literal["safetensors", "torch_export"]


def export(
    method: TTAMethod, path: str | Path, *, format: Format = "safetensors", images: Tensor | None = None
) -> Path:
    """Write the net as adapted so far.

    ``safetensors`` has the names of the net's own state dict. Read by
    :func:`~lightning_tta.backbones.create.load_weights` into the plain net, it gives the logits of
    ``method.predict``. Where the method does more than run the net, it does not, and the file's metadata says under
    ``lacks`` (``method.lacks``) what is missing: BatchNorm with statistics of the test batch; with CoTTA also the mean
    over views where the source is unsure.

    Args:
        method: A method that has adapted.
        path: The file.
        format: ``torch_export`` writes the plain net as a program for ``torch.export.load``, any batch size.
        images: (B, C, H, W), B >= 2, an example for ``torch_export``.

    Returns:
        The path.

    Raises:
        ConfigError: If the method has no adapted weights, or ``torch_export`` gets no images.
    """
    check_choice("format", format, ("safetensors", "torch_export"))
    weights = _adapted(method.name, method.state_dict(), method.weight_names)
    if format == "safetensors":
        return _write(Path(path), weights, method.name, method.options, method.lacks)
    if images is None or len(images) < 2:
        raise ConfigError("format='torch_export' needs images (B, C, H, W), B >= 2, as an example of the input.")
    with torch.inference_mode(False), torch.no_grad():
        net = copy.deepcopy(method.model).requires_grad_(False)
        net.load_state_dict({name: value.to(images.device) for name, value in weights.items()}, strict=False)
        program = torch.export.export(net, (images.clone(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    write_whole(Path(path), lambda file: torch.export.save(program, file))
    return Path(path)


def export_run(run: str | Path, output: str | Path = "adapted.safetensors", process: int | None = None) -> Path:
    """Write the net of a predict run that saved its state (``save_every``), at its end or as last saved.

    Args:
        run: The run's directory, or the one above where only one of the runs has saved its state.
        output: A ``.safetensors`` file.
        process: Whose net, of a run of several processes: each of them has adapted a net of its own.

    Raises:
        DataError: If the run has no saved state.
        ConfigError: If its method has no adapted weights, or if it does not have the one net that was asked for.
    """
    run = _run_directory(Path(run))
    path = run / (FINAL if (run / "report.json").exists() else STATE)
    states = {file: state for file in of_all(path) if (state := read_state(file, head=True)) is not None}
    state = states.get(path if process is None else of_process(path, process))
    if state is None and states:
        raise ConfigError(f"Say which net of {run}: {'; '.join(_describe(*item) for item in states.items())}.")
    if state is None:
        raise DataError(
            f"{run} has no saved state ({FINAL}, or {STATE} of an unfinished run). Give the directory of a predict run "
            "that was made with --state.save_every N; to make this one again with a state, repeat its command with "
            "--state.save_every N --state.resume restart."
        )
    identity = state["identity"]
    options = {name.removeprefix("method."): value for name, value in identity.items() if name.startswith("method.")}
    weights = _adapted(identity["method"], state["method"], state["weight_names"])
    return _write(Path(output), weights, identity["method"], options, state["lacks"])


def _run_directory(path: Path) -> Path:
    """The directory itself, or that of the only run below it with a saved state."""
    if any(of_all(path / name) for name in (STATE, FINAL)):
        return path
    runs = sorted({state.parent for pattern in ("state*.pt", "final_state*.pt") for state in path.glob(f"*/{pattern}")})
    if len(runs) > 1:
        raise ConfigError(f"Say which run of {path}: {', '.join(run.name for run in runs)} have saved their states.")
    return runs[0] if runs else path


def _describe(path: Path, state: State) -> str:
    """Which net a state has, and how to ask for it."""
    rank, domain = path.stem.partition(".rank")[2], state["position"][0]
    where = "as it began" if domain is None else f"last on '{state['summary']['domain_names'][domain]}'"
    return f"{path.name}, {where} ({f'--process {rank}' if rank else 'without --process'})"


def _adapted(name: str, state: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The net's tensors by their own names, each a copy in the net's dtype, as adapted."""
    if not names:
        raise ConfigError(
            f"Method '{name}' has no adapted weights to export: with these options it leaves the net as it was, or "
            "starts from the source for each image or batch. What it keeps beside the net is in method.state_dict()."
        )
    return {
        plain: state[key].detach().to("cpu", state[f"model.{plain}"].dtype, copy=True).contiguous()
        for plain, key in names.items()
    }


def _write(path: Path, weights: dict[str, Tensor], method: str, options: Mapping[str, Any], lacks: str) -> Path:
    if path.suffix != ".safetensors":
        raise ConfigError(f"The weights go to a .safetensors file; got {str(path)!r}.")
    metadata = {"lightning_tta": __version__, "method": method, "options": json.dumps(options, sort_keys=True)}
    content = save(weights, {**metadata, "lacks": lacks})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write(content))
    return path
