"""Writes a page for each method and each data module from its docstring, options and configuration files.

``conf.py`` calls it at the start of each build. A new method or data module gets its page without being listed here.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import yaml

from lightning_tta import methods
from lightning_tta.data import ShiftedDataModule, data_modules
from lightning_tta.launch.help import class_options, say_captured, without_markup
from lightning_tta.reproduce import claims
from lightning_tta.reproduce.needs import SETS

DOCS = Path(__file__).parent
CONFIGS = DOCS.parent / "configs"


def write_pages() -> None:
    """Write ``methods/*.rst`` and ``data/*.rst``, and remove the pages of what is gone."""
    pages = {f"methods/{name}": method_page(name) for name in methods.names()}
    rows = [(f":doc:`{name}`", without_markup(methods.docstring(name).split("\n")[0])) for name in methods.names()]
    pages["methods/index"] = index("Methods", "One page a method. :doc:`/guides/choosing` helps to choose.", rows)
    pages["guides/all-methods"] = all_methods()
    pages["guides/claims"] = all_claims()
    pages["data/options"] = options_page()
    kinds = data_modules()
    pages |= {f"data/{name}": data_page(kind) for name, kind in kinds.items()}
    rows = [(f":doc:`{name}`", " ".join(inspect.getdoc(kind).split("\n\n")[0].split())) for name, kind in kinds.items()]
    about = "One page a data module. :doc:`options` are those that all of them have: the stream, domains, batch sizes."
    pages["data/index"] = index("Data modules", about, [*rows, (":doc:`options`", "The options of every data module.")])
    for folder in ("methods", "data"):
        for old in (DOCS / folder).glob("*.rst"):
            if f"{folder}/{old.stem}" not in pages:
                old.unlink()
    for name, text in pages.items():
        path = DOCS / (f"{name}.md" if name.startswith("guides/") else f"{name}.rst")
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or path.read_text() != text:  # sphinx builds anew what is newer
            path.write_text(text)


COLUMNS = {
    "does": "minimizes, or does",
    "learns": "learns",
    "passes": "passes (forward / backward)",
    "needs": "needs",
    "holds": "holds beside the net",
    "suits": "streams it is made for",
    "formula": "formula from",
    "paper": "paper",
}
"""The columns of the table of all methods, by the names of what a method says of itself."""


ALL_METHODS = """\
# All methods

<!-- Written by docs/pages.py from what each method's class says of itself: `about`. Do not edit it here. -->

Names are those of the option `--model.method` and of `lightning_tta.adapt`. What is not in a column is in the
method's docstring, which is its page on the site; `lightning-tta methods tent` describes one with its options.
[Which one when](choosing.md)

{table}

- **Norm layers** are BatchNorm, GroupNorm, LayerNorm, InstanceNorm and RMSNorm with weight and bias, found by type.
  With BatchNorm a method that learns them normalizes with the batch's statistics, unless it says otherwise or
  [`statistics=`](statistics.md) does. Any method that learns can learn other parameters: [adapters](adapters.md).
- **Linear head**: one linear layer at the end, found by what runs last.
- **Source images** are shown to `method.prepare(source_batches)` once, before the stream. Some want a source that was
  trained for them: [source phase](source-phase.md).
- **Formula from**: the authors' code, their paper, or both where they agree. *Reconstruction*: neither code nor a
  whole formula was published, so what is built here is a reading of it, and no published number may be expected.
  *Own work*: of this project, without a paper.
- **Over**: what the net takes and gives, the option `task`: [pixels and values](dense.md),
  [language models](language.md).
- **Tested against**: a plain float64 reference in `tests/methods/`, written out from the formula: loss, parameters
  and state over several steps. Shared tests say of each: only what is declared moves, reset and save/load are
  bit-exact, labels cannot reach it, one image, two classes and a thousand work, broken batches leave no trace.
- **Not here**: SAR2 (arXiv 2509.04977), of which only the abstract could be read, and SDA, which needs two diffusion
  models.
- **Step on CUDA**: whether the whole step becomes one graph. Of some it is parts, because:
{reasons}
"""


def all_methods() -> str:
    """The page with the table of all methods, in Markdown, which is kept in the repository."""
    kinds = methods.available_methods()
    rows = [["name", *COLUMNS.values(), "over", "step on CUDA"], ["---"] * (len(COLUMNS) + 3)]
    reasons: dict[str, list[str]] = {}
    for name, kind in kinds.items():
        about, reason = methods.about(name), kind.step_on_host
        over = ", ".join(sorted(kind.tasks))
        rows.append([f"`{name}`", *(about[column] for column in COLUMNS), over, "parts" if reason else "captured"])
        if reason:
            reasons.setdefault(reason, []).append(f"`{name}`")
    return ALL_METHODS.format(
        table="\n".join(f"| {' | '.join(row)} |" for row in rows),
        reasons="\n".join(f"  - {', '.join(named)}: {reason}." for reason, named in reasons.items()),
    )


def all_claims() -> str:
    """The page with all claims of papers, in Markdown, which is kept in the repository."""
    return CLAIMS.format(claims="\n\n".join(map(claim_section, claims.names())))


CLAIMS = """\
# Claims of papers

<!-- Written by docs/pages.py from lightning_tta/reproduce/claims. Do not edit it here. -->

What `lightning-tta reproduce NAME` reruns: [how, and what comes out](reproduce.md). Figures in percent; those of single
corruptions are in the claims' files.

{claims}
"""


def claim_section(name: str) -> str:
    """A claim with its figures."""
    claim = claims.load(name)
    lines = [f"## {name}", "", f"{claim.title}. {claim.paper}. Code: {claim.code or 'none known'}.", ""]
    lines += [*(f"- {note}" for note in claim.notes), ""] if claim.notes else []
    for label, part in claim.parts.items():
        lines += [f"**`{label}`**: {part.title}. Needs: {', '.join(SETS[need].title for need in part.needs)}.", ""]
        for published in part.published:
            lines += [
                f"{published.measure.capitalize()}: {published.stands} (read in: {claims.KINDS[published.kind]}).",
                "",
            ]
            lines += [*figure_table(published), ""]
        lines += [*(f"- Not published: {text}" for text in part.unknown)]
        lines += [*(f"- Differs: {text}" for text in part.differs)]
        lines += [""] * bool(part.unknown or part.differs)
    return "\n".join(lines).strip()


def figure_table(published: claims.Published) -> list[str]:
    """Methods and nets with the means over domains; how many single figures there are where there is no mean."""
    nets = list(dict.fromkeys([*published.figures, *published.domains]))
    methods = list(dict.fromkeys(m for by in (published.figures, published.domains) for net in by for m in by[net]))

    def cell(net: str, method: str) -> str:
        singles = published.domains.get(net, {}).get(method, [])
        if method not in published.figures.get(net, {}):
            return f"{len(singles)} single figures" if singles else "-"
        figure = published.figures[net][method]
        value, spread = figure if isinstance(figure, list) else (figure, None)
        return "not known" if value is None else f"{value:g}{f' ± {spread:g}' if spread is not None else ''}"

    head = ["method", *("mean of the nets" if net == claims.EVERY else net for net in nets), "tolerance"]
    rows = [[f"`{m}`", *(cell(net, m) for net in nets), f"{published.tolerance_of(m):g}"] for m in methods]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def method_page(name: str) -> str:
    """What a method does, how it is called, its options and configuration files."""
    kind = methods.find(name)
    text, arguments = split_docstring(kind)
    rest = re.search(r"^\*\*options: (.*(?:\n .*)*)", arguments, re.MULTILINE)
    shipped = sorted(path for path in CONFIGS.rglob("*.yaml") if is_of(kind, path))
    parts = [
        f".. highlight:: none\n\n.. py:currentmodule:: {kind.__module__}",
        title(name),
        link_papers(text),
        f"The class is :class:`~{kind.__module__}.{kind.__name__}`.",
        title("Use", "-"),
        f'.. code-block:: python\n\n   method = lightning_tta.adapt(model, "{name}")\n   logits = method(images)',
        ".. code-block:: bash\n\n   lightning-tta predict --config configs/digits/predict.yaml \\\n"
        f"       --model.source_ckpt runs/digits/source --model.method {name}",
        f"{say_captured(kind)} :doc:`/guides/gpu`",
        title("Options", "-"),
        option_table(kind, class_options(kind)) or "None.",
        f"Of the options that several methods share: {' '.join(rest[1].split())}" if rest else "",
        "Every method takes more options: ``statistics`` and ``window``, :doc:`/guides/statistics`; ``prior`` and "
        "``refine``, :doc:`/guides/corrections`; ``reservoir``, "
        ":class:`~lightning_tta.methods.components.reservoir.Reservoir`; ``gate``, "
        ":class:`~lightning_tta.methods.components.gates.PoemGate`; ``select``, where it learns by gradients, "
        ":doc:`/guides/adapters`; and what :doc:`/guides/gpu` lists.",
        title("Configuration files", "-") if shipped else "",
        *(literal_include(path) for path in shipped),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def data_page(kind: type[ShiftedDataModule]) -> str:
    """What a data module reads, and its own options."""
    text, _ = split_docstring(kind)
    arguments = inspect.signature(kind).parameters  # the others are handed on to the base
    own = {name: option for name, option in class_options(kind).items() if name in arguments}
    parts = [
        f".. highlight:: none\n\n.. py:currentmodule:: {kind.__module__}",
        title(kind.__name__),
        link_papers(text),
        f"The class is :class:`~{kind.__module__}.{kind.__name__}`.",
        title("Options", "-"),
        option_table(kind, own) or "None of its own.",
        "And those of every data module: :doc:`options`.",
    ]
    return "\n\n".join(parts) + "\n"


def options_page() -> str:
    """The options of every data module."""
    about = "On the command line ``--data.NAME VALUE``, in Python arguments of the class."
    table = option_table(ShiftedDataModule, class_options(ShiftedDataModule))
    return "\n\n".join([title("Options of every data module"), about, table]) + "\n"


def split_docstring(kind: type) -> tuple[str, str]:
    """The docstring without its arguments, and their text."""
    text = inspect.getdoc(kind) or ""
    arguments = re.search(r"^Args:\n((?: .*\n|\n)*)", f"{text}\n", re.MULTILINE)
    text = re.sub(r"^Args:\n(?: .*\n|\n)*", "", f"{text}\n", flags=re.MULTILINE)
    text = re.sub(r"^Raises:\n((?: .*\n|\n)*)", raises, text, flags=re.MULTILINE)
    return text.strip(), inspect.cleandoc(f"\n{arguments[1]}") if arguments else ""


def raises(section: re.Match[str]) -> str:
    """The section of errors as a list."""
    items = inspect.cleandoc(f"\n{section[1]}")
    return (
        "Raises:\n\n"
        + re.sub(r"^(\w+): ", r"- :class:`~lightning_tta.errors.\1`: ", items, flags=re.M).replace("\n    ", "\n  ")
        + "\n\n"
    )


def link_papers(text: str) -> str:
    """The text with its arXiv numbers as links."""
    return re.sub(r"\b(\d{4}\.\d{5})\b", r"`\1 <https://arxiv.org/abs/\1>`__", text)


def option_table(kind: type, options: Mapping[str, argparse.Action]) -> str:
    """Options of a class, their defaults and meanings as a table; empty without options."""
    arguments = inspect.signature(kind).parameters
    rows = []
    for name, option in options.items():
        required = name in arguments and arguments[name].default is inspect.Parameter.empty
        default = "required" if required else f"``{option.default}``"
        meaning = link_papers(" ".join((option.help or "").split()))
        rows.append(f"   * - ``{name}``\n     - {default}\n     - {meaning}")
    head = ".. list-table::\n   :widths: 20 14 66\n   :header-rows: 1\n\n   * - option\n     - default\n     - meaning"
    return "\n".join([head, *rows]) if rows else ""


def literal_include(path: Path) -> str:
    """A configuration file with its name."""
    name = path.relative_to(CONFIGS.parent)
    return f".. literalinclude:: ../../{name}\n   :language: yaml\n   :caption: {name}"


def is_of(kind: type, path: Path) -> bool:
    """Whether a configuration file is that of this class."""
    return class_in(path).rpartition(".")[2] == kind.__name__


@cache
def class_in(path: Path) -> str:
    """The class that a configuration file names at its top, or nothing; kept, for each method asks it of all files."""
    content = yaml.safe_load(path.read_text())
    return str(content.get("class_path", "")) if isinstance(content, dict) else ""


def index(name: str, about: str, rows: Iterable[tuple[str, str]]) -> str:
    """A page with a table of pages."""
    rows = list(rows)
    table = "\n".join(f"   * - {page}\n     - {text}" for page, text in rows)
    pages = "\n".join(f"   {page.removeprefix(':doc:').strip('`')}" for page, _ in rows)
    table = f".. list-table::\n   :widths: 20 80\n\n{table}"
    return f"{title(name)}\n\n{about}\n\n{table}\n\n.. toctree::\n   :hidden:\n\n{pages}\n"


def title(text: str, line: str = "=") -> str:
    """A heading."""
    return f"{text}\n{line * len(text)}"


if __name__ == "__main__":
    write_pages()
