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
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tta.backbones import create_backbone
from lightning_tta.backbones.split import find_head
from lightning_tta.data import FolderData
from lightning_tta.methods.base.method import TTAMethod
from lightning_tta.methods.come import COME
from lightning_tta.methods.lame import LAME
from lightning_tta.methods.source import Source
from lightning_tta.methods.t3a import T3A
from lightning_tta.methods.tent import Tent

FACTORS = (1.0, 0.5, 0.25)


def softened(net: nn.Module, factor: float) -> nn.Module:
    """A copy of a classifier whose logits are ``factor`` times those of the net."""
    net = copy.deepcopy(net)
    head = find_head(net)[1]
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(factor)
    return net


class Told(T3A):
    """T3A whose bank takes only images of which the net is right: an oracle, by what a bank has ``known``."""

    known: dict[bytes, tuple[int, int]]

    def _add(self, new: Tensor, classes: Tensor, entropies: Tensor) -> None:
        right = classes == torch.tensor([self.known[row.numpy().tobytes()][0] for row in new])
        super()._add(new[right], classes[right], entropies[right])


class Bank:
    """Knows the label and the domain of every image that T3A has seen, by its row of the bank."""

    def __init__(self, method: T3A) -> None:
        self.method = method
        self.known: dict[bytes, tuple[int, int]] = {}

    def look(self, images: Tensor, labels: Tensor, domain: int) -> None:
        """Note a batch."""
        with torch.no_grad():
            rows = nn.functional.normalize(self.method.split(images)[0].to(self.method.sums.dtype), dim=1)
        for row, label in zip(rows, labels.tolist(), strict=True):
            self.known[row.numpy().tobytes()] = (label, domain)

    def composition(self, domain: int) -> list[float]:
        """Shares in percent of the images in the bank: of another class than they support, of earlier domains."""
        found = []
        for number, rows in enumerate(self.method.supports):
            for row in rows:
                image = self.known.get(row.numpy().tobytes())  # none: the classifier's own row, or an empty place
                if image is not None:
                    found.append((image[0] != number, image[1] != domain))
        shares = torch.tensor(found, dtype=torch.float64).reshape(-1, 2).mean(0)
        return [100 * float(share) for share in shares]


def batches(data: FolderData) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Images, labels and the domain of each batch."""
    for batch in data.predict_dataloader():
        yield batch["image"], batch["label"], int(batch["domain"][0])


def errors(method: TTAMethod, data: FolderData, after: Callable[[int], Any] = lambda domain: None) -> Tensor:
    """Error in percent of each domain; ``after`` is called at the end of each."""
    wrong = torch.zeros(2, len(data.stream_domains), dtype=torch.float64)
    last = 0
    for images, labels, domain in batches(data):
        if domain != last:
            after(last)
        last = domain
        wrong[0, domain] += (method(images).argmax(1) != labels).sum()
        wrong[1, domain] += len(labels)
    after(last)
    return 100 * wrong[0] / wrong[1]


def doubt(net: nn.Module, continual: FolderData, sorted_by_class: FolderData) -> list[dict[str, float]]:
    """The first table, a row a factor."""
    rows = []
    print("\n| factor | length of the logits | confidence | source | tent | come | lame, class-sorted |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for factor in FACTORS:
        soft = softened(net, factor)
        with torch.no_grad():
            seen = [(soft(images), labels) for images, labels, _ in batches(continual)]
        logits, labels = (torch.cat(parts) for parts in zip(*seen, strict=True))
        row = {
            "factor": factor,
            "length": float(logits.norm(dim=1).mean()),
            "confidence": 100 * float(logits.softmax(1).amax(1).mean()),
            "source": 100 * float((logits.argmax(1) != labels).double().mean()),
        }
        for name, method, data in (
            ("tent", Tent, continual),
            ("come", COME, continual),
            ("lame", LAME, sorted_by_class),
        ):
            row[name] = float(errors(method(copy.deepcopy(soft)), data).mean())
        rows.append(row)
        print("| " + " | ".join(f"{value:.3g}" for value in row.values()) + " |", flush=True)
    return rows


def bank(net: nn.Module, data: FolderData) -> list[dict[str, Any]]:
    """The second table, a row a domain."""
    t3a, told = T3A(copy.deepcopy(net)), Told(copy.deepcopy(net))
    kept, held = Bank(t3a), list[list[float]]()
    for images, labels, domain in batches(data):
        kept.look(images, labels, domain)
    told.known = kept.known
    free = errors(t3a, data, lambda domain: held.append(kept.composition(domain)))
    columns = {"source": errors(Source(copy.deepcopy(net)), data), "t3a": free, "told": errors(told, data)}
    print("\n| domain | source | t3a | told | bank: mistakes | bank: of earlier domains |")
    print("|---|---:|---:|---:|---:|---:|")
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(data.stream_domains):
        row = {column: float(values[number]) for column, values in columns.items()}
        row |= dict(zip(("mistakes", "earlier"), held[number], strict=True))
        rows.append({"domain": name, **row})
        print(f"| {name} | " + " | ".join(f"{value:.1f}" for value in row.values()) + " |")
    means = {name: sum(row[name] for row in rows) / len(rows) for name in row}
    print("| mean | " + " | ".join(f"{value:.1f}" for value in means.values()) + " |")
    return [*rows, {"domain": "mean", **means}]


def main(args: list[str] | None = None) -> tuple[list[dict[str, float]], list[dict[str, Any]]]:
    """Run both experiments and print their tables; returns their rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--root", required=True, help="folder of images, ROOT/test/<class>/*")
    parser.add_argument("--net", default="cifar/resnet26_gn")
    parser.add_argument("--source-ckpt", required=True)
    parser.add_argument("--domains", nargs="+", default=["reported"])
    parser.add_argument("--function-set", default="imagenet_c", choices=("imagenet_c", "builtin"))
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=200)
    given = parser.parse_args(args)
    torch.manual_seed(0)

    def stream(kind: str) -> FolderData:
        data = FolderData(
            given.root,
            stream=kind,
            domains=given.domains,
            function_set=given.function_set,
            severity=1,
            num_images=given.images,
            batch_size=given.batch_size,
        )
        data.setup("predict")
        return data

    continual, sorted_by_class = stream("continual"), stream("label_shift")
    net = create_backbone(given.net, continual.num_classes, weights=given.source_ckpt).eval()
    return doubt(net, continual, sorted_by_class), bank(net, continual)


if __name__ == "__main__":
    main()
