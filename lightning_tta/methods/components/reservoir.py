"""ReservoirTTA: a state of a method for each domain that it meets, so that domains that come again are remembered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from lightning_tta.backbones.norms import norm_layers, norm_parameters
from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.backbones.split import execution_order, recorded_calls
from lightning_tta.errors import ConfigError, DataError, UnsupportedModelError, check_range
from lightning_tta.losses import at_least_float32, entropy
from lightning_tta.methods.base.memory import DomainMemory
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.base.state import NOT_YET, OTHERS, State
from lightning_tta.methods.components.source_images import see_source_images
from lightning_tta.methods.components.wanted import check_options

STYLES, NUMBER, CURRENT, SOURCE = (f"{OTHERS}{name}" for name in ("styles", "number", "current", "source"))
BANK = f"{OTHERS}bank."


class Reservoir(DomainMemory):
    """Up to M states of a method, each with the style of its domain; a batch goes to the nearest.

    The style of a batch is the mean over its images of the log variance over positions of each channel of what the
    first norm layers of the source net get: early layers see how an image was taken, not what is on it. State 0 is the
    source's. With d_m the distance of a batch's style from that of state m, and T the largest usual distance between
    batches of source images of the same size::

        if min d > T and fewer than M states: a new state, with this style, copied from that of the states with which
            the mutual information of the batch's predictions, H(mean p) - mean H(p), is largest
        the nearest state takes the method's step, and predicts; its style moves towards the batch's, as a mean over
            its batches

    T is the 0.999 quantile of the distances among 32 random groups of source images, as many in a group as in the
    batch, times ``threshold``.

    A state is all that the method declares: norm parameters, optimizer, statistics of BatchNorm, filters. What a prior
    or a refinement of the predictions learns is of the whole stream. Memory: M of them, and 512 source images'
    variances. Per batch: one forward pass more than the method's, and one for each state where a new one opens.
    ``predict`` takes the state of the last batch.

    Args:
        method: One that learns norm parameters, or keeps statistics.
        members: M, at least 2; authors 16.
        threshold: Factor of T, > 0.
        layers: Norm layers, from the first to run, that the style is of, >= 1.
        seed: Of the groups.

    Raises:
        ConfigError: If a value is out of range.
        UnsupportedModelError: If the method has no state to remember, or learns more than norm parameters.

    Source: ReservoirTTA, arXiv 2505.14511. Differs from the authors' code: the style is of the net's own early layers
    and not of a VGG net, which need not be downloaded, and of each image, not of the batch as a whole; a style is the
    mean over its batches, where they train all of them with AdamW at 1e-4; statistics belong to a state too; the
    nearest state predicts, and not an average of all.
    """

    GROUPS, SOURCE_IMAGES = 32, 512

    def __init__(
        self, method: TTAMethod, *, members: int = 16, threshold: float = 1.0, layers: int = 3, seed: int = 0
    ) -> None:
        check_range("members", members, 2, integer=True)
        check_range("threshold", threshold, 0, low_open=True)
        check_range("layers", layers, 1, integer=True)
        check_range("seed", seed, 0, 2**62, integer=True)
        self.members, self.threshold, self.seed = members, threshold, seed
        _check_small(method)
        self.layers = _first_norms(method.model, layers)
        self._states = [*method.adaptable, *method.rest]
        for name in self._states:
            tensor = method.value(name)
            method.state(
                f"{BANK}{name}",
                tensor.detach().expand(members, *tensor.shape).clone(),
                source=method.source_value(name),
            )
        width = sum(_width(layer) for layer in self.layers.values())
        like = next(iter(method.model.parameters())).detach()
        room = at_least_float32(like.new_zeros(0))
        method.state(STYLES, room.new_full((members, width), NOT_YET))
        for name, value in ((NUMBER, 1), (CURRENT, 0)):
            method.state(name, torch.full((), value, dtype=torch.int64, device=like.device), source=value)
        method.state(f"{OTHERS}batches", torch.zeros(members, dtype=torch.int64, device=like.device), source=0)
        empty = torch.full((self.SOURCE_IMAGES, width), NOT_YET, dtype=torch.float64, device=like.device)
        method.state(SOURCE, empty, fixed_dtype=True)
        self._place: tuple[int, int] | None = None
        self._limits: dict[int, Tensor] = {}

    # Source ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prepare(self, method: State, source_batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Take the variances of up to 512 source images.

        Raises:
            DataError: If there are fewer than 4 finite ones.
            UnsupportedModelError: If the layers see one value per channel.
        """
        assert isinstance(method, TTAMethod)
        rows: list[Tensor] = []
        buffer = method.value(SOURCE)
        see_source_images(
            method,
            source_batches,
            lambda images: rows.append(self._variances(method, images)),
            most=self.SOURCE_IMAGES,
            running=nullcontext,  # as it runs where styles are taken
        )
        with outside_inference_mode():
            found = torch.cat(rows) if rows else buffer[:0]
            found = found[found.isfinite().all(1)]
            if len(found) < 4:
                raise DataError(
                    f"reservoir= needs at least 4 source images, to know how styles differ within a domain; found "
                    f"{len(found)} whose activations are finite. Give batches {{'image': (B, C, H, W) in [0, 1]}} of "
                    "the training set."
                )
            buffer.fill_(NOT_YET)[: len(found)].copy_(found)
            style = _styles(found, found).mean(0)
            if self._at(method)[0] == 1:  # what the method has prepared itself is of the source's state
                for member in range(self.members):
                    self._copy_to(method, member)
            method.write(STYLES, torch.cat([style[None], method.value(STYLES)[1:]]))
            method.renew_source(STYLES)
            method.renew_source(SOURCE)
        self._limits.clear()

    def limit(self, method: State, images: int) -> Tensor:
        """T for batches of so many images, 0-dimensional."""
        size = min(images, self.SOURCE_IMAGES // 2)  # so that there are no more limits than that
        if size not in self._limits:
            source = _source(method)
            styles, together = _styles(source, source), max(1, min(size, len(source) // 2))
            generator = torch.Generator().manual_seed(self.seed)
            groups = [torch.randperm(len(source), generator=generator)[:together] for _ in range(self.GROUPS)]
            styles = torch.stack([styles[group.to(styles.device)].mean(0) for group in groups])
            self._limits[size] = torch.pdist(styles).quantile(0.999) * self.threshold
        limit: Tensor = self._limits[size]
        return limit

    # Along the stream ------------------------------------------------------------------------------------------------

    def style(self, method: State, x: Tensor) -> Tensor:
        """Log variance of the channels, (D,), float64."""
        assert isinstance(method, TTAMethod)
        self._images = len(x)
        return _styles(self._variances(method, x), _source(method)).mean(0)

    def assign(self, method: State, style: Tensor, predict: Callable[[], Tensor]) -> None:
        """Bring the method to the nearest state, or to a new one."""
        limit = self.limit(method, self._images)
        number, current = self._at(method)
        styles = method.value(STYLES)
        distances = (styles[:number].double() - style).norm(dim=1)
        nearest, is_new = int(distances.argmin()), bool(distances.min() > limit) and number < self.members
        if not bool(distances.isfinite().all()):
            nearest, is_new = current, False
        self._style = style if bool(style.isfinite().all()) else None
        if is_new:
            best, information = 0, -float("inf")
            for member in range(number):
                self._load(method, member)
                value = float(_mutual_information(predict()))
                if value > information:
                    best, information = member, value
            self._load(method, best)
            nearest, number = number, number + 1
            self._copy_to(method, nearest)
            styles[nearest].copy_(style)
        else:
            self._load(method, nearest)
        self._write(method, number, nearest)

    def store(self, method: State) -> None:
        """Keep the method's state; its style has one batch more."""
        member = self._at(method)[1]
        self._copy_to(method, member)
        if self._style is None:
            return
        batches, styles = method.value(f"{OTHERS}batches"), method.value(STYLES)
        batches[member] += 1
        if member:  # the source's style is of the source images
            styles[member].lerp_(self._style.to(styles), float(1 / batches[member]))

    def look_again(self) -> None:
        """Read number, present state and source images from the method's state."""
        self._place = None
        self._limits.clear()

    def _at(self, method: State) -> tuple[int, int]:
        if self._place is None:
            number, current = torch.stack([method.value(NUMBER), method.value(CURRENT)]).tolist()
            self._place = int(number), int(current)
        return self._place

    def _write(self, method: State, number: int, current: int) -> None:
        method.value(NUMBER).fill_(number)
        method.value(CURRENT).fill_(current)
        self._place = number, current

    def _load(self, method: State, member: int) -> None:
        with torch.no_grad():
            for name in self._states:
                method.value(name).detach().copy_(method.value(f"{BANK}{name}")[member])

    def _copy_to(self, method: State, member: int) -> None:
        with torch.no_grad():
            for name in self._states:
                value = method.value(name).detach()
                bank = method.value(f"{BANK}{name}")
                if bank.shape[1:] != value.shape:  # of a state that was allocated since
                    bank = method.sized(f"{BANK}{name}", value.new_empty(self.members, *value.shape))
                bank[member].copy_(value)

    @torch.no_grad()
    def _variances(self, method: TTAMethod, x: Tensor) -> Tensor:
        """Of each channel over the positions of each image, (B, D), float64."""
        with method.at_source(), recorded_calls(self.layers) as calls:
            method.task.logits(method.model(x))
        first: dict[str, Tensor] = {}
        for name, inputs, _ in calls:
            first.setdefault(name, inputs[0])
        rows = []
        if all(values.ndim < 3 for values in first.values()):
            raise UnsupportedModelError(
                "reservoir= takes the style of an image from its positions in the first norm layers; those of this net "
                f"get one value per channel: {', '.join(first)}. Leave reservoir out."
            )
        for name, layer in self.layers.items():
            values = first[name].double()
            if values.ndim < 3:  # one value per channel: no style
                rows.append(torch.ones_like(values))
                continue
            values = values.flatten(1, -2) if _is_channel_last(layer) else values.flatten(2).transpose(1, 2)
            rows.append(values.var(1, unbiased=False))
        return torch.cat(rows, 1)


def _source(method: State) -> Tensor:
    variances = method.value(SOURCE)
    return variances[variances.isfinite().all(1)]


def _styles(variances: Tensor, source: Tensor) -> Tensor:
    """Of each image (B, D); a thousandth of the source's variance, so that a flat image is not far from all others."""
    return (variances + (1e-3 * source.mean(0)).clamp_min(1e-8)).log()


def _mutual_information(logits: Tensor) -> Tensor:
    mean = at_least_float32(logits).softmax(-1).mean(0)
    information: Tensor = -torch.special.xlogy(mean, mean).sum() - entropy(logits).mean()
    return information


def _is_channel_last(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.LayerNorm, nn.RMSNorm))


def _width(layer: nn.Module) -> int:
    return next(len(p) for p in layer.parameters(recurse=False))


def _first_norms(model: nn.Module, number: int) -> dict[str, nn.Module]:
    layers = {
        name: layer
        for name, layer in norm_layers(model).items()
        if [p.ndim for p in layer.parameters(recurse=False)][:1] == [1]
    }
    order = execution_order(model)
    names = [name for name in order if name in layers] if order is not None else list(layers)
    if not names:
        raise UnsupportedModelError(
            f"reservoir= takes the style of a batch from the first norm layers; {type(model).__name__} has none with "
            "weights that runs. Leave reservoir out."
        )
    return {name: layers[name] for name in names[:number]}


def _check_small(method: TTAMethod) -> None:
    learned = {name.removeprefix("model.") for name in method.adaptable if name.startswith("model.")}
    if not method.adaptable and not method.rest:
        raise ConfigError(f"reservoir= remembers states, and '{method.name}' has none. Leave reservoir out.")
    if method.images_apart or (learned and not learned <= set(norm_parameters(method.model))):
        raise UnsupportedModelError(
            f"reservoir= is for methods that learn norm parameters; '{method.name}' learns more, or each image anew. "
            "Use it with 'tent', 'zerosiam', 'eata', 'sar' and the like."
        )


def choose(method: TTAMethod, wanted: int | Mapping[str, int | float]) -> None:
    """Let a method remember domains.

    Args:
        method: Before its first batch.
        wanted: The number of states, or a dict of :class:`Reservoir`'s options.

    Raises:
        ConfigError: If an option is unknown or out of range.
    """
    options = dict(wanted) if isinstance(wanted, Mapping) else {"members": wanted}
    check_options(options, "reservoir", Reservoir)
    method.remember(Reservoir(method, **options))
