"""Experiments on why COME, LAME and T3A gain less than their papers: the doubt of the source, and the bank's mistakes.

    python tests/measure/reasons.py --root ROOT --net cifar/resnet26_gn --source-ckpt resnet26_gn.safetensors

First table: the source's logits are multiplied by a factor, which leaves its predictions and takes its confidence.
Tent and COME on the stream without resets, LAME on the class-sorted stream. Second table, without resets: what T3A's
bank holds at the end of each corruption, and T3A against one that is told the labels and keeps right images only.
Nothing here is a method: labels are used. Errors in percent; protocols as in configs/cifar10/benchmark.yaml.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lightning_tta.backbones import create_backbone
from lightning_tta.data import ShiftedDataModule
from lightning_tta.losses import entropy
from lightning_tta.methods import adapt
from plumbing import arguments, digits_or_folder, header, row

FACTORS = (1.0, 0.5, 0.25)
FILTER = 100  # T3A's default: images kept for each class
Batch = tuple[Tensor, Tensor, int]  # images, labels, domain


def head_of(net: nn.Module) -> nn.Linear:
    """The last linear layer."""
    return [module for module in net.modules() if isinstance(module, nn.Linear)][-1]


def softened(net: nn.Module, factor: float) -> nn.Module:
    """A copy of a classifier whose logits are ``factor`` times those of the net."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in head_of(net).parameters():
            parameter.mul_(factor)
    return net


class Bank:
    """T3A in plain torch, whose bank knows the label and the domain of each image; ``told``: it takes right ones only.

    A class starts with its row of the classifier; of its images those of lowest entropy stay.
    """

    def __init__(self, net: nn.Module, told: bool = False, size: int = FILTER) -> None:
        self.net, self.told, self.size = net, told, size
        head_of(net).register_forward_pre_hook(lambda module, inputs: self.features.append(inputs[0]))
        self.features: list[Tensor] = []
        with torch.no_grad():
            weight = head_of(net).weight
            self.rows, self.entropies = normalize(weight, dim=1), entropy(head_of(net)(weight))
        self.features.clear()
        self.classes = torch.arange(len(weight))
        self.labels = torch.full((len(weight),), -1)  # not of an image
        self.domains = torch.full((len(weight),), -1)

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor, domain: int) -> Tensor:
        """Add a batch, then predict it: logits (B, K)."""
        logits = self.net(images)
        features = self.features.pop()
        classes = logits.argmax(1)
        chosen = classes == labels if self.told else torch.ones_like(classes, dtype=torch.bool)
        self.rows = torch.cat([self.rows, normalize(features, dim=1)[chosen]])
        self.entropies = torch.cat([self.entropies, entropy(logits)[chosen]])
        self.classes = torch.cat([self.classes, classes[chosen]])
        self.labels = torch.cat([self.labels, labels[chosen]])
        self.domains = torch.cat([self.domains, torch.full_like(labels, domain)[chosen]])
        order = self.entropies.argsort(stable=True)
        order = torch.cat([order[self.classes[order] == k][: self.size] for k in range(logits.shape[1])]).sort()[0]
        for name in ("rows", "entropies", "classes", "labels", "domains"):
            setattr(self, name, getattr(self, name)[order])
        sums = torch.zeros(logits.shape[1], features.shape[1]).index_add_(0, self.classes, self.rows)
        return features @ normalize(sums, dim=1).T

    def composition(self, domain: int) -> list[float]:
        """Shares in percent of the images in the bank: of another class than they support, of earlier domains."""
        image = self.labels >= 0
        shares = (self.labels != self.classes)[image], (self.domains != domain)[image]
        return [100 * float(share.double().mean()) for share in shares]


def batches(data: ShiftedDataModule) -> Iterator[Batch]:
    """Images, labels and the domain of each batch."""
    for batch in data.predict_dataloader():
        yield batch["image"], batch["label"], int(batch["domain"][0])


def net_and_streams(
    doc: str | None, args: list[str] | None, streams: Sequence[str], **more: Any
) -> tuple[argparse.Namespace, nn.Module, list[ShiftedDataModule]]:
    """The command line with further options, the source net, and the streams."""
    options = arguments(
        doc,
        args,
        root=(str, "folder of images, ROOT/test/<class>/*"),
        net="cifar/resnet26_gn",
        source_ckpt=str,
        function_set=("imagenet_c", "or builtin"),
        images=2000,
        **more,
    )
    torch.manual_seed(0)
    settings = {name: getattr(options, name) for name in ("domains", "function_set", "batch_size")}
    data = [
        digits_or_folder(options.root, {}, {}, stream=stream, num_images=options.images, **settings)
        for stream in streams
    ]
    net = create_backbone(options.net, data[0].num_classes, weights=options.source_ckpt).eval()
    return options, net, data


def errors(predict: Callable[..., Tensor], data: ShiftedDataModule, after: Callable[[int], Any] = id) -> Tensor:
    """Error in percent of each domain; ``after`` is called with its number at the end of each."""
    wrong = torch.zeros(2, len(data.stream_domains), dtype=torch.float64)
    last = 0
    for images, labels, domain in batches(data):
        if domain != last:
            after(last)
        last = domain
        logits = predict(images, labels, domain) if isinstance(predict, Bank) else predict(images)
        wrong[0, domain] += (logits.argmax(1) != labels).sum()
        wrong[1, domain] += len(labels)
    after(last)
    return 100 * wrong[0] / wrong[1]


def doubt(net: nn.Module, continual: ShiftedDataModule, class_sorted: ShiftedDataModule) -> list[dict[str, float]]:
    """The first table, a row a factor."""
    rows = []
    print()
    header("factor", "length of the logits", "confidence", "source", "tent", "come", "lame, class-sorted")
    for factor in FACTORS:
        soft = softened(net, factor)
        with torch.no_grad():
            logits = torch.cat([soft(images) for images, _, _ in batches(continual)])
        figures = {
            "factor": factor,
            "length": float(logits.norm(dim=1).mean()),
            "confidence": 100 * float(logits.softmax(1).amax(1).mean()),
        }
        for name in ("source", "tent", "come", "lame"):
            data = class_sorted if name == "lame" else continual
            options = {"uncertainty": None} if name == "come" else {}  # the paper's
            figures[name] = float(errors(adapt(soft, name, **options), data).mean())
        rows.append(figures)
        row(*(f"{value:.3g}" for value in figures.values()))
    return rows


def bank(net: nn.Module, data: ShiftedDataModule) -> list[dict[str, Any]]:
    """The second table, a row a domain."""
    t3a, told = Bank(copy.deepcopy(net)), Bank(copy.deepcopy(net), told=True)
    held: list[list[float]] = []
    columns = {
        "source": errors(adapt(net, "source"), data),
        "t3a": errors(t3a, data, lambda domain: held.append(t3a.composition(domain))),
        "told": errors(told, data),
    }
    print()
    header("domain", "source", "t3a", "told", "bank: mistakes", "bank: of earlier domains")
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(data.stream_domains):
        figures = {column: float(values[number]) for column, values in columns.items()}
        rows.append({"domain": name, **figures, **dict(zip(("mistakes", "earlier"), held[number], strict=True))})
    rows.append({"domain": "mean"} | {name: sum(r[name] for r in rows) / len(rows) for name in list(rows[0])[1:]})
    for name, *values in (figures.values() for figures in rows):
        row(name, *(f"{value:.1f}" for value in values))
    return rows


def main(args: list[str] | None = None) -> tuple[list[dict[str, float]], list[dict[str, Any]]]:
    """Run both experiments and print their tables; returns their rows."""
    streams = ("continual", "label_shift")
    _, net, (continual, class_sorted) = net_and_streams(__doc__, args, streams, domains=["reported"], batch_size=200)
    return doubt(net, continual, class_sorted), bank(net, continual)


if __name__ == "__main__":
    main()
