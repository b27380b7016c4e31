"""What README, CONTRIBUTING, docs and notebooks point to exists: pages, headings, files, error messages.

``sphinx-build -b linkcheck docs OUT`` looks at the links to other sites.
"""

import ast
import functools
import importlib.util
import inspect
import json
import re
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from lightning_tta import methods
from lightning_tta.data import data_modules
from lightning_tta.methods.base.description import About

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(path for path in sorted(DOCS.rglob("*.md")) if "_build" not in path.parts),
    *sorted(ROOT.glob("notebooks/*.ipynb")),
]
BUILT = {DOCS / "methods/index.rst", DOCS / "data/index.rst"}  # by each build of the site
BUILT |= {DOCS / f"methods/{name}.rst" for name in methods.names()} | {
    DOCS / f"data/{name}.rst" for name in data_modules()
}
EXAMPLES = r"foo|info_max|docs/_build"  # methods that the reader writes, and the site that the reader builds
FILES = r"(?:lightning_tta|configs|tests|docs|notebooks)/[\w./-]+"


@functools.cache
def load(name):
    """A module of ``docs/``."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text_of(path):
    """The Markdown of a page; of a notebook, that of its cells."""
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def without_code(text):
    """Markdown without its fenced blocks and comments."""
    return re.sub(r"^ *```.*?^ *```|<!--.*?-->", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text):
    """The anchors of a page's headings, as GitHub and MyST make them: ``# Own net, own way`` -> ``own-net-own-way``."""
    headings = re.findall(r"^#{1,6} (.+)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(path, text):
    """The links of a page to other places of the repository that are not there."""
    text, dead = without_code(text), []
    text_outside = re.sub(r"`[^`]*`", "", text)
    for link in re.findall(r"\]\(([^)\s]+)\)", text_outside):
        if re.match(r"\w+:", link):  # another site
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        exists = target.is_file() or target in BUILT
        if not exists or (anchor and anchor not in anchors(text_of(target))):
            dead.append(link)
    return dead


def missing_files(text):
    """The files of the repository that a page names in backquotes and that are not there."""
    names = {name for span in re.findall(r"`([^`]+)`", without_code(text)) for name in re.findall(FILES, span)}
    return sorted(name for name in names if "..." not in name and not (ROOT / name.rstrip("/.")).exists())


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_link_and_no_file_name_is_dead(path):
    text = text_of(path)
    assert not dead_links(path, text)
    assert not [name for name in missing_files(text) if not re.search(EXAMPLES, name)]


@pytest.mark.parametrize(
    ("text", "dead"),
    [
        ("[a](docs/guides/own-net.md) ![b](docs/images/none.png)", ["docs/images/none.png"]),
        (
            "[a](docs/guides/own-net.md#in-python) [b](docs/guides/own-net.md#in-pascal)",
            ["docs/guides/own-net.md#in-pascal"],
        ),
        ("# Own words\n\n[a](#own-words) [b](#other-words)", ["#other-words"]),
        (
            "[a](docs/methods/tent.rst) [b](docs/methods/tnet.rst) [c](https://example.org/none)",
            ["docs/methods/tnet.rst"],
        ),
        ("```\n[a](none.md)\n```\n`[b](none.md)`", []),
    ],
)
def test_dead_links_are_seen(text, dead):
    page = ROOT / "README.md"
    if "#own" not in text:
        assert dead_links(page, text) == dead
    else:
        assert anchors(text) == {"own-words"}
    assert missing_files("`configs/none.yaml` and `configs/digits/source.yaml`, `configs/`") == ["configs/none.yaml"]


def test_readme_is_short_and_has_the_two_marked_blocks():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 200
    for marker in ("<!-- fresh:main -->", "<!-- fresh:tests -->"):
        assert re.search(rf"^{marker}\n```bash\npip install", text, re.MULTILINE)


def messages():
    """The texts of the package's modules: of a formatted text its fixed parts, with \\0 between them."""
    found = []
    for path in (ROOT / "lightning_tta").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_troubleshooting_quotes_messages_that_exist():
    quotes = re.findall(r"^### `(.+)`$", (DOCS / "guides/troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quotes) > 40
    assert len(set(quotes)) == len(quotes)
    known = messages()
    for quote in [*quotes, "no module says this"]:
        pattern = re.compile(".*".join(map(re.escape, re.split(r" ?\.\.\. ?", quote))), re.DOTALL)
        assert any(map(pattern.search, known)) == (quote in quotes), quote


@pytest.mark.parametrize("name", methods.names())
def test_each_method_has_a_page_with_its_options_and_files(name):
    pages, kind = load("pages"), methods.find(name)
    page = pages.method_page(name)
    options = [option for option in inspect.signature(kind).parameters if option not in ("model", "options")]
    assert all(f"   * - ``{option}``\n" in page for option in options)
    assert f"configs/methods/{name}.yaml" in page
    assert "Args:" not in page
    paper = re.search(r"\d{4}\.\d{5}", methods.docstring(name))
    assert paper is None or f"https://arxiv.org/abs/{paper[0]}" in page


def test_the_page_of_claims_is_what_the_claims_say():
    pages = load("pages")
    text = (DOCS / "guides/claims.md").read_text()
    assert text == pages.all_claims(), "python docs/pages.py writes it"
    assert "| `zerosiam` | 51.1 | 63.4 | 49.9 | 49.8 | 50.1 | 52.9 | 2 |" in text
    assert "not known" in text


def test_the_table_of_all_methods_is_what_the_methods_say():
    pages = load("pages")
    assert (DOCS / "guides/all-methods.md").read_text() == pages.all_methods(), "python docs/pages.py writes it"
    for name, kind in methods.available_methods().items():
        said = methods.about(name)
        assert "about" in vars(kind), name  # its own, none of a base class
        assert said == vars(kind.about), name
        assert all(said.values()), name
        assert said["formula"] in get_args(get_type_hints(About)["formula"]), name
        assert re.search(r"\S / \d|by its steps|of its candidates", said["passes"]), name


@pytest.mark.parametrize("kind", data_modules().values())
def test_each_data_module_has_a_page(kind):
    page = load("pages").data_page(kind)
    own = [name for name in inspect.signature(kind).parameters if name not in ("kwargs", "options")]
    assert all(f"   * - ``{name}``\n" in page for name in own)
    assert "``batch_size``\n" not in page  # on the page of the options that all have
