"""What to know of a net and its images before anything adapts: said in words, each method tried on one batch."""

from __future__ import annotations

import math
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tta.backbones import Backbone
from lightning_tta.backbones.norms import batch_norm_layers, norm_layers
from lightning_tta.backbones.quantized import has_quantized, storages
from lightning_tta.errors import ConfigError, InputError, LightningTTAError
from lightning_tta.methods import adapt, docstring, find, names
from lightning_tta.methods.base.state import size, take

FEW, MANY = 16, 64
"""Images in a batch: below the first, batch statistics are too noisy to use; from the second on they are sound."""

STAND_INS = 16
"""Images that stand in for source images while a method is tried; POEM wants 10 at least, CAFA two classes."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CENTERED = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

Advice = tuple[tuple[str, Mapping[str, Any], str], ...]
ADVICE: dict[str, Advice] = {
    "batch norm": (
        ("eta", {}, "best or level with the best of the methods with batch statistics, at one backward pass"),
        ("zerosiam", {}, "resists the collapse of entropy minimization on long streams"),
        ("norm", {}, "no backward pass; most of the gain of the other two, nothing to tune"),
    ),
    "batch norm, small batches": (
        ("t3a", {}, "leaves the statistics and the weights alone; replaces the head by prototypes"),
        ("norm", {"source_weight": 0.9}, "mixes a tenth of the batch's statistics into the source's"),
    ),
    "batch norm, one image": (
        ("single_image_bn", {}, "made for one image: its statistics, mixed into the source's"),
        ("t3a", {}, "leaves the statistics and the weights alone; replaces the head by prototypes"),
    ),
    "other norm": (
        ("zerosiam", {}, "resists the collapse of entropy minimization, also on class-sorted streams"),
        ("ostta", {}, "leaves out images on which the adapted net is less sure than the source"),
        ("sar", {}, "leaves out unsure images, and resets itself; twice the passes"),
    ),
    "no norm": (
        ("t3a", {}, "needs no norm layers; replaces the head by prototypes"),
        ("lame", {}, "needs no norm layers; gains where images of one class follow each other"),
    ),
}
"""By what the net and the batch are: method, options, why. From the project's own tables on digits and CIFAR-10."""


@dataclass(frozen=True)
class Trial:
    """One method tried on the net.

    Attributes:
        method: Its name.
        options: What it was built with, where that is not the default.
        role: ``start here``, ``runs`` or ``cannot run``.
        reason: Why.
        forwards: Forward passes of a batch.
        backwards: Backward passes of a batch.
        time: Seconds of a batch, relative to the source's; of those that are recommended.
        kept: Bytes of activations that a step keeps for its backward passes; of those that are recommended.
        state: Bytes of what the method may change.
    """

    method: str
    role: str
    reason: str
    options: dict[str, Any] = field(default_factory=dict)
    forwards: float = 0.0
    backwards: float = 0.0
    time: float | None = None
    kept: int | None = None
    state: int = 0


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`doctor` found. ``print`` it, or read its parts.

    Attributes:
        facts: What was found, by subject: ``net``, ``preprocessing``, ``images``, ``classes``, ``norm layers``,
            ``batch``.
        warnings: What will go wrong if nothing is done, and what to do.
        trials: One of each method, those to start with first.
        seconds: Of a forward pass of the source over the batch.
    """

    facts: dict[str, str]
    warnings: list[str]
    trials: list[Trial]
    seconds: float

    @property
    def recommended(self) -> list[Trial]:
        """The methods to start with, the first one first; may be empty."""
        return [trial for trial in self.trials if trial.role == "start here"]

    def to_dict(self) -> dict[str, Any]:
        """The same in primitives."""
        return {**asdict(self), "recommended": [trial.method for trial in self.recommended]}

    def configuration(self) -> dict[str, Any]:
        """The part of a configuration of ``predict`` that names the method; without one to recommend: the source."""
        best = self.recommended[0] if self.recommended else Trial("source", "start here", "")
        kind = find(best.method)
        method: dict[str, Any] = {"class_path": f"{kind.__module__}.{kind.__qualname__}"}
        if best.options:
            method["init_args"] = dict(best.options)
        return {"method": method}

    def __str__(self) -> str:
        width = max(map(len, self.facts)) + 2
        lines = [_wrapped(f"{subject + ':':{width}}", text) for subject, text in self.facts.items()]
        lines += ["", *(_wrapped("! ", text) for text in self.warnings)] if self.warnings else []
        lines += ["", f"start with (time of a batch relative to the source's {self.seconds * 1e3:.0f} ms):"]
        for trial in self.recommended:
            options = ", ".join(f"{name}={value}" for name, value in trial.options.items())
            lines.append(_wrapped(f"  {trial.method}{f' ({options})' if options else ''}: ", f"{trial.reason}.", 4))
            lines.append(_wrapped("    ", _cost(trial)))
        if not self.recommended:
            lines.append("  source: no method that suits runs on this net.")
        lines.append("Run the source beside it: what is better on your stream, only a comparison tells.")
        others = [trial for trial in self.trials if trial.role == "runs"]
        if others:
            lines += ["", "these run too (tried on two images):"]
            lines += [_wrapped(f"  {t.method}: ", f"{t.reason} ({_passes(t)})", 4) for t in others]
        refused = [trial for trial in self.trials if trial.role == "cannot run"]
        if refused:
            lines += ["", "these cannot run:", *(_wrapped(f"  {trial.method}: ", trial.reason, 4) for trial in refused)]
        return "\n".join(lines)


def doctor(net: nn.Module, images: Tensor, *, class_names: Sequence[str] | None = None) -> Diagnosis:
    """Look at a net and a few images before anything adapts.

    Says what preprocessing, classes and norm layers were found and what the batch size means, tries every method on
    the net (a copy; ``net`` is left alone), and runs those it recommends on the whole batch. What it recommends
    follows from the norm layers and the batch size, not from the images: labels are not known here.

    Args:
        net: Pixels (B, C, H, W) in [0, 1] -> logits (B, K).
        images: A batch (B, C, H, W), floating point, pixels in [0, 1], as the stream will bring them: its B counts.
        class_names: Names of the classes that the images are of, to be compared with the number of logits.

    Raises:
        ConfigError: If ``images`` is no tensor.
        InputError: If the net refuses the images, or they are no pixels in [0, 1].
        UnsupportedModelError: If no method can run on the net, with the reason.
    """
    if not isinstance(images, Tensor):
        raise ConfigError(
            f"images must be a tensor (B, C, H, W) with pixels in [0, 1]; got {type(images).__name__}. For a folder "
            "give it to the command line: lightning-tta doctor --data ImageFolderData --data.path FOLDER."
        )
    source = adapt(net, "source")
    source(images)  # the first pass is slow, and an input that does not fit is refused here
    start = time.perf_counter()
    logits = source(images)
    _wait(images)
    seconds = time.perf_counter() - start
    found: list[str] = []
    facts = {
        "net": _describe_net(net),
        "preprocessing": _preprocessing(net, images, logits, found),
        "images": _pixels(images, source.stats["nonfinite_images"], found),
        "classes": _classes(logits, class_names, found),
        "norm layers": _norms(net),
        "batch": _batch(net, images, logits, found),
    }
    advised = {method: (options, reason) for method, options, reason in ADVICE[_kind(net, len(images))]}
    trials = [_try(net, images, logits, seconds, name, *advised.get(name, (None, ""))) for name in names()]
    order = {name: place for place, name in enumerate(advised)}
    roles = ("start here", "runs", "cannot run")
    trials.sort(key=lambda trial: (roles.index(trial.role), order.get(trial.method, 0), trial.method))
    return Diagnosis(facts, found, [trial for trial in trials if trial.method != "source"], seconds)


def _kind(net: nn.Module, batch_size: int) -> str:
    if batch_norm_layers(net):
        small = "batch norm, one image" if batch_size == 1 else "batch norm, small batches"
        return "batch norm" if batch_size >= FEW else small
    return "other norm" if any(True for layer in norm_layers(net).values() for _ in layer.parameters()) else "no norm"


def _describe_net(net: nn.Module) -> str:
    parameters = sum(parameter.numel() for parameter in net.parameters())
    name = f"{net.name} ({net.weights} weights)" if isinstance(net, Backbone) else type(net).__name__
    return f"{name}, {parameters:,} parameters{', quantised' if has_quantized(net) else ''}"


def _preprocessing(net: nn.Module, images: Tensor, logits: Tensor, found: list[str]) -> str:
    """The net's own normalization, or, where it is not known, with which of the usual ones the net is surest."""
    if isinstance(net, Backbone):
        if net.weights == "random":
            found.append("The weights are random: predictions are chance. Load weights before anything adapts.")
        settings = net.preprocessing
        height = settings["input_size"] and settings["input_size"][-1]
        if height and height != images.shape[-1]:
            size = f"The images have {images.shape[-1]} pixels a side, "
            found.append(
                f"{size}the weights were trained with {height}: resize them, or expect less accuracy."
                if net.pretrained
                else f"{size}{net.name} was published for {height}. If your weights were trained with {height}, resize."
            )
        trained = f", {'trained at' if net.pretrained else 'published for'} {height} pixels" * bool(height)
        round_ = [[round(value, 3) for value in settings[key]] for key in ("mean", "std")]
        return f"inside the net: mean {round_[0]}, std {round_[1]}{trained}"
    sure = {"as it is": _sureness(logits)}
    if images.shape[1] == 3:
        for name, (mean, std) in {"ImageNet's": IMAGENET, "0.5 and 0.5": CENTERED}.items():
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                sure[name] = _sureness(adapt(Backbone(net, mean, std), "source")(images))
    best = max(sure, key=sure.__getitem__)
    if best != "as it is" and sure[best] > max(0.4, sure["as it is"] + 0.05):
        mean, std = IMAGENET if best == "ImageNet's" else CENTERED
        found.append(
            f"The net may expect normalized images: it is surer ({sure[best]:.2f} against {sure['as it is']:.2f} mean "
            f"confidence) with mean and std {best}. If it was trained so, wrap it: lightning_tta.Backbone(net, "
            f"mean={list(mean)}, std={list(std)})."
        )
    texts = ", ".join(f"{name} {value:.2f}" for name, value in sure.items())
    return f"not known: the net gets pixels in [0, 1] as they are (mean confidence by normalization: {texts})"


def _sureness(logits: Tensor) -> float:
    return float(logits.float().softmax(-1).amax(-1).mean())


def _pixels(images: Tensor, nonfinite: float, found: list[str]) -> str:
    values = images[images.isfinite()]
    if nonfinite == len(images):
        raise InputError("No image of this batch has finite pixels throughout: look at how the images are read.")
    low, high = float(values.min()), float(values.max())
    if low < -0.1 or high > 1.1:
        found.append(
            f"Pixels span [{low:.2f}, {high:.2f}] and should be in [0, 1]. If they are normalized already, leave that "
            "out, and put mean and std into the net: lightning_tta.Backbone(net, mean, std)."
        )
    if nonfinite:
        found.append(f"{nonfinite:.0f} images have pixels that are not finite: they are left out, and get no class.")
    return f"{len(images)} of {'x'.join(map(str, images.shape[1:]))}, pixels from {low:.2f} to {high:.2f}"


def _classes(logits: Tensor, class_names: Sequence[str] | None, found: list[str]) -> str:
    number, classes = len(logits), logits.shape[-1]
    share = Counter(logits.argmax(-1).tolist())
    largest, count = share.most_common(1)[0]
    finite = int(torch.isfinite(logits.logsumexp(-1)).sum())
    if finite < number:
        found.append(
            f"The source's logits are not finite for {number - finite} of {number} images: infinite weights, or values "
            "too large for the net's precision? Look at the weights; or run the net in float32 or bfloat16."
        )
    probabilities = logits.float().softmax(-1)
    entropy = float(torch.special.entr(probabilities).sum(-1).mean()) / math.log(max(classes, 2))
    if class_names is not None and len(class_names) != classes:
        excess = ", ".join(map(str, class_names[classes : classes + 3]))
        found.append(
            f"The images are of {len(class_names)} classes, the net has {classes} logits"
            + (f": it can never predict {excess}{', ...' * (len(class_names) > classes + 3)}." if excess else ".")
        )
    if bool(torch.isfinite(logits).all()) and bool((logits >= 0).all() and (logits.sum(-1) - 1).abs().max() < 1e-3):
        found.append("The net's rows are probabilities already (they sum to 1). Return the logits before the softmax.")
    elif entropy > 0.98:
        found.append("The net is as unsure as can be of every image: are its weights loaded, and normalization right?")
    if number >= FEW and count / number > 0.9 and classes > 1:
        found.append(
            f"The source predicts class {largest} for {count} of {number} images. Unless they are, check weights and "
            "normalization: no method mends that."
        )
    return f"{classes} logits; {len(share)} of them predicted in {number} images; entropy {100 * entropy:.0f} % of ln K"


def _norms(net: nn.Module) -> str:
    kinds = Counter(type(layer).__name__ for layer in norm_layers(net).values())
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"


def _batch(net: nn.Module, images: Tensor, logits: Tensor, found: list[str]) -> str:
    """What the batch size means for batch statistics, with how much they change on this batch."""
    number = len(images)
    if not batch_norm_layers(net):
        return f"{number} images; the net has no BatchNorm, so that each image is predicted by itself"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = adapt(net, "norm")(images)
    changed = float((own.argmax(-1) != logits.argmax(-1)).float().mean())
    text = f"{number} images; with statistics of this batch, {100 * changed:.0f} % of the predictions change"
    if number < FEW:
        found.append(
            f"Batches of {number} are too small for batch statistics, which norm, tent, zerosiam, eata and most others "
            f"use with BatchNorm: they lose to the source. Give batches of {MANY} or more, or a method that needs none."
        )
    elif number < MANY:
        text += f"; they are noisy below {MANY} images"
    return text + ". They also fail where most images of a batch are of one class: shuffle, or use larger batches"


def _try(
    net: nn.Module,
    images: Tensor,
    logits: Tensor,
    seconds: float,
    name: str,
    options: Mapping[str, Any] | None,
    reason: str,
) -> Trial:
    """Build a method and run it: one that is recommended on the whole batch, another one on two images."""
    advised = options is not None
    batch = images if advised else images[:2]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            method = adapt(net, name, **(options or {}))
            method.skips_when_empty = False  # a step that keeps no sample costs as much as any other where it counts
            if method.needs_source:
                number = torch.arange(max(len(batch), STAND_INS), device=images.device)
                stand_ins = {"image": images[number % len(images)], "label": number % logits.shape[-1]}
                method.prepare([stand_ins])
            with _saved_bytes(method) as kept:
                method(batch)
            stats = method.stats
            if advised:
                method.reset()
                start = time.perf_counter()
                method(batch)
                _wait(batch)
                elapsed = time.perf_counter() - start
    except LightningTTAError as error:
        return Trial(name, "cannot run", str(error))
    except Exception as error:  # the other methods may run
        return Trial(name, "cannot run", f"{type(error).__name__}: {error}")
    trial = Trial(name, "runs", "", {}, stats["forwards"], stats["backwards"], state=size(take(method)))
    if advised:
        kept_bytes = round(kept[0] / max(trial.backwards, 1))
        times = elapsed / max(seconds, 1e-9)
        return replace(
            trial, role="start here", reason=reason, options=dict(options or {}), time=times, kept=kept_bytes
        )
    what = " ".join(docstring(name).split("\n\n")[0].replace("`", "").split()).rstrip(".")
    needs = "; needs source images before the stream" if method.needs_source else ""
    return replace(trial, reason=what[:1].lower() + what[1:] + needs)


@contextmanager
def _saved_bytes(method: nn.Module) -> Iterator[list[int]]:
    """Bytes that are kept for backward passes, without the parameters; each storage once."""
    known = {storage.data_ptr() for parameter in method.parameters() for storage in storages(parameter)}
    total = [0]

    def pack(tensor: Tensor) -> Tensor:
        for storage in storages(tensor):
            if storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                total[0] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


def _cost(trial: Trial) -> str:
    kept = f"{(trial.kept or 0) / 2**20:.1f} MB kept for a backward pass" if trial.backwards else "nothing kept"
    return f"{_passes(trial)}, {trial.time:.1f}x the time, {kept}, state {trial.state / 2**10:.0f} kB"


def _passes(trial: Trial) -> str:
    return f"{trial.forwards:g} forward, {trial.backwards:g} backward passes"


def _wrapped(head: str, text: str, indent: int | None = None) -> str:
    """At most 100 columns; further lines start below the text, or at ``indent``."""
    further = " " * (len(head) if indent is None else indent)
    return textwrap.fill(text, 100, initial_indent=head, subsequent_indent=further, break_on_hyphens=False)


def _wait(images: Tensor) -> None:
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
