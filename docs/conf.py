"""Settings of the documentation site: Markdown pages, and the reference, methods and data from the docstrings.

sphinx-build -W --keep-going docs docs/_build
sphinx-build -b linkcheck docs docs/_build/links     # the links to other sites
"""

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

from lightning_tta import __version__

sys.path.insert(0, str(Path(__file__).parent))
from pages import write_pages

project = "lightning_tta"
release = __version__
language = "en-GB"
copyright = "the lightning_tta authors, Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.apidoc", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "api/modules.rst"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3  # a heading is found by its words: page.md#its-words

apidoc_modules = [
    {
        "path": "../lightning_tta",
        "destination": "api",  # written anew by each build, not kept in the repository
        "exclude_patterns": ["../lightning_tta/__main__.py"],
        "separate_modules": True,
        "module_first": True,
        "automodule_options": {"members", "show-inheritance"},
    }
]
autodoc_default_options = {"ignore-module-all": True}  # what a package hands on is described where it is defined
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_ivar = True  # else the fields of a named tuple are described twice
python_maximum_signature_line_length = 100

nitpicky = True  # a reference in a docstring to a function or module that does not exist is an error, except:
nitpick_ignore_regex = [
    ("py:(class|data|obj|exc)", r".*"),  # types in signatures, mostly torch's, whose index is not at hand
    ("py:(meth|attr)", r"\w+"),  # inherited ones
    ("py:func", r".*\._.*"),  # in private modules
]

html_theme = "furo"
html_title = f"lightning_tta {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]


def setup(app: Sphinx) -> None:
    """Write the pages of methods and data; give those of the reference titles that fit the sidebar: ``tent``."""

    def shorten(app: Sphinx, page: str, source: list[str]) -> None:
        if page.startswith("api/"):
            title = re.split(r"[./]", page)[-1]
            source[0] = re.sub(r"\A.*\n=+\n", f"{title}\n{'=' * len(title)}\n", source[0])

    def follow(app: Sphinx, module: str, name: str) -> str | None:
        """Only the package's top level hands names on; else fields of named tuples are looked for in ``builtins``."""
        return None if module == "lightning_tta" else module

    app.connect("builder-inited", lambda app: write_pages())
    app.connect("viewcode-follow-imported", follow)
    app.connect("source-read", shorten)
