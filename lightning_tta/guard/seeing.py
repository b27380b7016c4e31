"""What monitors see of a batch: made for any method, and only what one of them wants."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tta.backbones.graphs import GraphHead
from lightning_tta.backbones.norms import batch_norm_layers
from lightning_tta.backbones.passes import outside_inference_mode
from lightning_tta.backbones.quantized import dequantized, is_quantized
from lightning_tta.backbones.split import as_logits
from lightning_tta.errors import DataError, UnsupportedModelError
from lightning_tta.guard.monitors.base import Monitor, Seen, Want
from lightning_tta.losses import at_least_float32
from lightning_tta.methods.base.method import PredictWith, TTAMethod
from lightning_tta.methods.base.task import float_dtype
from lightning_tta.methods.components.source_images import see_source_images


@dataclass
class HeadCall:
    """A call of the net's last linear layer.

    Attributes:
        features: What went in, (B, D), detached.
        output: What came out, (B, K), detached.
        head: The layer with the weights that it had in this call.
        of_images: Whether it was the end of a pass of the net over the batch itself.
    """

    features: Tensor
    output: Tensor
    head: nn.Linear
    of_images: bool = False


class Sight:
    """Makes :class:`~lightning_tta.guard.monitors.base.Seen` of a method's batches.

    ``features`` are those of the pass whose output is the answer, as the last linear layer of the net has seen them;
    where a batch was answered in parts, of all of them together. Where the answer is no output of the net (prototypes,
    a correction, a mean of two nets), they are those of the pass over the batch whose output is nearest to it. Where
    there is no such pass (views of the images; episodes with other last layers for each image), or where nothing inside
    a pass can be watched without making it slower (steps that are recorded on CUDA; the graph of an exported net), the
    method predicts the batch once more.

    Args:
        method: The method.
        monitors: The monitors.

    Attributes:
        monitors: Those that look at the next batch.
        wants: What they want.
        forwards: Passes so far for their sake.

    Raises:
        UnsupportedModelError: If a monitor wants features, and the net has no linear layer that they could go into.
    """

    def __init__(self, method: TTAMethod, monitors: Iterable[Monitor]) -> None:
        self.method, self.forwards = method, 0
        self.look(monitors)
        for monitor in self.monitors:
            if "features" in monitor.wants:
                try:
                    _ = method.split
                except UnsupportedModelError as error:
                    raise UnsupportedModelError(
                        f"Monitor '{monitor.name}' needs the features that go into the net's last linear layer. {error}"
                    ) from None

    def look(self, monitors: Iterable[Monitor]) -> None:
        """Let these monitors look at the next batch."""
        self.monitors = list(monitors)
        self.wants: frozenset[Want] = frozenset().union(*(monitor.wants for monitor in self.monitors))

    def answer(self, images: Tensor, run: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[HeadCall]]:
        """What ``run`` answers for images, and the calls of the head meanwhile, where they are wanted."""
        method = self.method
        records = images.device.type == "cuda" and method.execution.capture is not False
        if "features" not in self.wants or records:
            return run(images), []
        with self._calls(images) as calls:
            return run(images), calls

    @torch.no_grad()
    def seen(
        self,
        images: Tensor,
        logits: Tensor,
        calls: Sequence[HeadCall] = (),
        index: Sequence[int | str] | None = None,
        same_source: Tensor | None = None,
        *,
        source: Tensor | None = None,
        wants: frozenset[Want] | None = None,
    ) -> Seen:
        """What there is to see of a batch.

        Args:
            images: Those that were answered, (B, C, H, W).
            logits: The answer (B, K).
            calls: As :meth:`answer` lists them.
            index: What the stream calls each image.
            same_source: As of :class:`~lightning_tta.guard.monitors.base.Seen`, if it is known; made if wanted.
            source: The same.
            wants: What is wanted of it; ``None``: what the monitors want.

        Raises:
            UnsupportedModelError: If features are wanted, and the net's output is not that of its last linear layer.
        """
        wants = self.wants if wants is None else wants
        if source is None and "source" in wants:
            source = same_source if same_source is not None and self.is_alike else self.source(images)
        if same_source is None and "same_source" in wants:
            if source is not None and self.is_alike:
                same_source = source
            else:
                same_source = self.same_source(images)
                self.forwards += 1
        features, head = self._features(images, logits, calls) if "features" in wants else (None, None)
        shows = "predict" in wants
        return Seen(
            logits,
            source=source,
            same_source=same_source,
            features=features,
            head=head,
            predict=self.predict if shows else None,
            images=images if shows else None,
            index=index,
        )

    def prepared(self, batches: Iterable[Mapping[str, Tensor]]) -> list[Seen]:
        """Source batches {image (B, C, H, W)} as monitors see them: answered by the source, without images."""
        seen: list[Seen] = []
        has_features, has_same = "features" in self.wants, "same_source" in self.wants

        def see(labels: Tensor | None, images: Tensor) -> None:
            with self._calls(images) as calls:
                logits = self.source(images)
            features, head = self._chosen(calls, logits) or self._bare(images) if has_features else (None, None)
            same = None if not has_same else logits if self.is_alike else self.same_source(images)
            one = Seen(logits, source=logits, same_source=same, features=features, head=head, labels=labels)
            seen.append(one)

        several = not isinstance(batches, Mapping) and hasattr(batches, "__iter__")
        with self.method.at_source():
            for batch in batches if several else ():
                see_source_images(self.method, [batch], partial(see, self._labels(batch)), running=nullcontext)
            if not several:
                see_source_images(self.method, batches, see)  # refuses them
        return seen

    def _labels(self, batch: object) -> Tensor | None:
        """The labels (B,) of the usable images of a batch of the source, where it has them, on the host.

        Raises:
            DataError: If they are no classes, one for each image.
        """
        labels, images = (batch.get(name) if isinstance(batch, Mapping) else None for name in ("label", "image"))
        if labels is None or not isinstance(images, Tensor):
            return None
        kind = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        whole = isinstance(labels, Tensor) and not labels.is_floating_point() and labels.dtype != torch.bool
        if not whole or labels.shape != images.shape[:1]:
            raise DataError(
                f"Labels of source images must be whole numbers in a tensor ({len(images)},), one for each image of "
                f"the batch, -1 where it is not known; got {kind}."
            )
        usable: Tensor = labels.cpu()[self.method.task.usable(images).cpu()].long()
        return usable

    @property
    def is_apart(self) -> bool:
        """Whether the method predicts images that came in several batches alike in one pass over all of them."""
        method = self.method
        return method.has_window or not (method.replaces_statistics or method.joins_images)

    @property
    def is_alike(self) -> bool:
        """Whether a method at its source predicts as the plain net does."""
        method, kind = self.method, type(self.method)
        runs_plain = kind.running is TTAMethod.running and not batch_norm_layers(method.model)
        return kind.infer is TTAMethod.infer and (runs_plain or not method.replaces_statistics)

    @torch.no_grad()
    def source(self, images: Tensor) -> Tensor:
        """Logits (B, K) of the source net, with the source's statistics."""
        self.forwards += 1
        method = self.method
        with outside_inference_mode(), torch.no_grad(), method.at_source(), method.computing(images.device):
            return at_least_float32(method.task.logits(method.model(self._as_net_takes(images))))

    @torch.no_grad()
    def same_source(self, images: Tensor, statistics: PredictWith = "batch") -> Tensor:
        """Logits (B, K) that the method gives from its source weights; who asks counts the pass."""
        with self.method.at_source():
            return self.method.predict(images, statistics=statistics)

    def predict(self, images: Tensor) -> Tensor:
        """Logits (B, K) of the method as it is now."""
        self.forwards += 1
        return self.method.predict(images, statistics="batch")

    def _as_net_takes(self, images: Tensor) -> Tensor:
        return images.to(float_dtype(self.method.model), copy=True)  # a net may write into its input

    # Features

    @contextmanager
    def _calls(self, images: Tensor) -> Iterator[list[HeadCall]]:
        """While active, the calls of the head are listed."""
        calls: list[HeadCall] = []
        if "features" not in self.wants:
            yield calls
            return
        method = self.method
        layer: Any = method.split.layer
        if isinstance(layer, GraphHead):  # no module
            yield calls
            return
        own = {id(tensor) for tensor in layer.parameters()} - {id(tensor) for tensor in method.adaptable.values()}
        ended = 0  # of the calls, those in passes that have ended

        def head_now() -> nn.Linear:
            if not isinstance(layer, nn.Linear) or is_quantized(layer.weight) or id(layer.weight) in own:
                return method.split.head
            last = calls[-1].head if calls else None
            return last if last is not None and _same_weights(last, layer) else _linear(layer.weight, layer.bias)

        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            calls.append(HeadCall(dequantized(inputs[0]).detach(), dequantized(output).detach(), head_now()))

        def end(module: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal ended
            new, ended = calls[ended:], len(calls)
            if len(new) == 1 and inputs and _equal(inputs[0], images):
                new[0].of_images = _equal(as_logits(output).detach(), new[0].output)

        handles = [layer.register_forward_hook(note), method.model.register_forward_hook(end)]
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()

    def _features(self, images: Tensor, logits: Tensor, calls: Sequence[HeadCall]) -> tuple[Tensor, nn.Linear]:
        """Features (B, D) of a batch, and the head that they went into."""
        chosen = self._chosen(calls, logits)
        if chosen is None:
            with self._calls(images) as calls:
                again = self.predict(images)
            chosen = self._chosen(calls, again)
        return self._bare(images) if chosen is None else chosen

    @staticmethod
    def _chosen(calls: Sequence[HeadCall], logits: Tensor) -> tuple[Tensor, nn.Linear] | None:
        """Of the calls, those whose outputs are the answer; else the one over the images that is nearest to it.

        A call over more images, those of a window, counts with the rows that are the answer.
        """
        calls = [_rows_of(call, logits) for call in calls]
        parts: list[HeadCall] = []
        done = 0
        for call in calls:
            rows = call.output.shape[0] if call.output.ndim == 2 else 0
            if rows and done + rows <= len(logits) and _equal(call.output, logits[done : done + rows]):
                parts.append(call)
                done += rows
                if done == len(logits):
                    break
        if done < len(logits):
            whole = [call for call in calls if call.of_images and call.output.shape == logits.shape]
            p = logits.softmax(1)
            parts = sorted(whole, key=lambda call: float((call.output.softmax(1) - p).abs().sum()))[:1]
        if not parts or any(p.features.ndim != 2 or not _same_weights(p.head, parts[0].head) for p in parts):
            return None
        return torch.cat([part.features for part in parts]), parts[0].head

    def _bare(self, images: Tensor) -> tuple[Tensor, nn.Linear]:
        """Those of a plain pass of the net as adapted."""
        self.forwards += 1
        method = self.method
        with outside_inference_mode(), torch.no_grad(), method.hold(), method.computing(images.device):
            features, _ = method.split(self._as_net_takes(images))
        return features, method.split.head


def _equal(first: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same values, in whatever precision."""
    return first is other or (first.shape == other.shape and bool((first == other).all()))


def _rows_of(call: HeadCall, logits: Tensor) -> HeadCall:
    """Of a call over more images than were answered, the rows that are the answer, if all of it is there."""
    if call.output.ndim != 2 or call.features.ndim != 2 or len(call.output) <= len(logits):
        return call
    if call.output.shape[1:] != logits.shape[1:]:
        return call
    alike = (call.output[:, None] == logits[None]).all(2)  # (rows of the call, rows of the answer)
    if not bool(alike.any(0).all()):
        return call
    rows = alike.int().argmax(0)
    return replace(call, features=call.features[rows], output=call.output[rows])


def _same_weights(first: nn.Linear, other: nn.Linear) -> bool:
    if first is other:
        return True
    pairs = ((first.weight, other.weight), (first.bias, other.bias))
    return all(_equal(a, b) if a is not None and b is not None else a is b for a, b in pairs)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with copies of a weight (K, D) and a bias (K,)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer
