"""Runs: their directories and the options of their callbacks; finished ones as files, and a page read back."""

import csv
import json
from html.parser import HTMLParser

import numpy as np

from lightning_tta.data.protocol import Protocol
from lightning_tta.run.options import MOVED, PARTS

VOID = {"meta", "br", "hr", "img", "link", "input"}
DOMAINS = ("fog", "noise")
BINS = [[10.0] * 4 + [0.0] * 11, [5.0] * 4 + [0.0] * 11, [4.0] * 4 + [0.0] * 11]


def directory_of(root):
    """The directory of the only run in or directly below ``root``."""
    (lock,) = (path for path in (root / "run.lock", *root.glob("*-*/run.lock")) if path.exists())
    return lock.parent


def callbacks_of(options):
    """The callbacks for those of the options that are not the module's, which are taken out."""
    parts = {}
    for name in options.keys() & MOVED.keys():
        part, _, option = MOVED[name].partition(".")
        parts.setdefault(part, {})[option] = options.pop(name)
    return [PARTS[part](**given) for part, given in parts.items()]


def protocol(**changes):
    fields = {"data": "toy", "domains": DOMAINS, "stream": "iid", "order_seed": 0, "batch_size": 10}
    fields |= {"reset": "domain", "predict": "method", "weights": "net: best.ckpt", "weights_digest": "abc"}
    return Protocol(**{**fields, "preprocessing": {}, **changes}).to_dict()


def write_run(directory, method, right, *, seed=0, protocol_changes=None, **more):
    """A finished run whose images were right as in ``right`` (two domains of equal size)."""
    directory.mkdir(parents=True)
    right = np.asarray(right, dtype=int)
    half = len(right) // 2
    parts = dict(zip(DOMAINS, (right[:half], right[half:]), strict=True))
    content = {
        "method": method,
        "net": {"name": "net", "weights": "best.ckpt", "digest": "abc"},
        "protocol": protocol(order_seed=seed, **(protocol_changes or {})),
        "accuracy": float(right.mean()),
        "images": len(right),
        "batches": len(right) // 10,
        "domains": {
            n: {"accuracy": float(p.mean()), "images": half, "largest_class_share": 0.3} for n, p in parts.items()
        },
        "forwards": 4,
        "backwards": 2,
        "seconds": 0.5,
        "seconds_per_batch": 0.125,
        **dict.fromkeys(("resets", "skipped_steps", "nonfinite_images"), 0),
        "environment": {"torch": "2.0", "device": "toy CPU"},
        **{"ece": 0.125, "nll": 1.5, "brier": 0.75, "reliability": BINS, "peak_memory_mb": 123.0},
        **more,
    }
    (directory / "report.json").write_text(json.dumps(content))
    with (directory / "predictions.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["index", "domain", "label", "prediction", "confidence", "entropy"])
        for index, hit in enumerate(right):
            rows.writerow([index, DOMAINS[index >= half], 1, 1 if hit else 0, 0.5, 0.5])
    with (directory / "batches.jsonl").open("w") as file:
        for start in range(0, len(right), 10):
            batch = {"batch": start // 10, "domain": DOMAINS[start >= half], "images": 10, "images_seen": start + 10}
            shares = {"recent_class_share": 0.3, "recent_label_share": 0.2}
            file.write(json.dumps({**batch, "accuracy": float(right[start : start + 10].mean()), **shares}) + "\n")
    return directory


def unlabelled(directory, share=0.3):
    """The same run without labels; returns its directory."""
    path = directory / "report.json"
    content = json.loads(path.read_text())
    for name in ("accuracy", "ece", "nll", "brier", "reliability"):
        content[name] = None
    for part in content["domains"].values():
        part |= {"accuracy": None, "entropy": 0.75, "largest_class_share": share}
    path.write_text(json.dumps(content))
    lines = (directory / "predictions.csv").read_text().splitlines()
    with (directory / "predictions.csv").open("w", newline="") as file:
        file.writelines(f"{line}\n" for line in [lines[0], *(line.replace(",1,", ",-1,", 1) for line in lines[1:])])
    batches = [json.loads(line) for line in (directory / "batches.jsonl").read_text().splitlines()]
    for batch in batches:
        batch |= {"accuracy": None, "recent_label_share": None, "entropy": 0.75}
    (directory / "batches.jsonl").write_text("".join(json.dumps(batch) + "\n" for batch in batches))
    return directory


def write_benchmark(root, cells, skipped=(), **more):
    """A finished benchmark; ``cells``: (method, seed) -> right ones."""
    rows = []
    for (method, seed), right in cells.items():
        directory = write_run(root / "cells" / f"{method}-{seed}", method, right, seed=seed, **more.get(method, {}))
        content = json.loads((directory / "report.json").read_text())
        row = {"method": method, "net": "net", "stream": "iid", "seed": seed, "accuracy": content["accuracy"]}
        row |= {"domains": content["domains"], "protocol_hash": content["protocol"]["hash"], "ece": content["ece"]}
        row |= {"forwards": 4, "backwards": 2, "seconds_per_batch": 0.125}
        rows.append({**row, "directory": str(directory.relative_to(root))})
    result = {"rows": rows, "methods": {}, "skipped": list(skipped), "environment": {}, "seconds": 1.0}
    (root / "benchmark.json").write_text(json.dumps(result))
    return root


def hits(seed, share, count=80):
    return np.random.default_rng(seed).random(count) < share


class Page(HTMLParser):
    """Checks that tags are balanced; collects tables, warnings and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.paragraphs, self.attributes = [], [], [], []
        self.warning = False
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "p":
            self.warning = ("class", "warning") in attrs
            self.paragraphs.append("")

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data.replace("\u00a0", " ")  # keeps an interval on one line
        if self.open and self.open[-1] == "p":
            self.paragraphs[-1] += data


def page_of(files):
    return Page(files[0].read_text())


def row_of(page, name, length, which=0):
    return [row for row in page.rows if row[0] == name and len(row) == length][which]
