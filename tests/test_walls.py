"""The walls of the package: no import runs upwards or in a circle, and no module touches a private name of another.

:data:`FLOORS` is the table of rooms, from the ground up. Imports inside functions and under ``TYPE_CHECKING`` count.
What Python runs on the way, the ``__init__`` of the packages above a module, does not.
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "lightning_tta"

FLOORS: tuple[dict[str, str], ...] = (  # a floor: room -> its modules; rooms of one floor do not know each other
    {"ground": "_version errors files shipped progress losses metrics collective draws imagenet_classes onnx_adapter"},
    {"evidence": "evidence"},  # formulas over what was predicted: monitors, methods and the chooser share them
    {"backbones": "backbones"},
    {"meta": "meta", "views": "views"},
    {"data": "data", "methods.base": "methods.base"},
    {"methods.components": "methods.components"},  # over backbones, meta, views: mixed layers and views serve several
    {"auxiliary": "auxiliary"},  # losses that source training and its test time share, and the base of such methods
    {"methods": "methods"},  # a method may build on another one; `methods/__init__` finds them by their files
    {"guard.monitors": "guard.monitors"},  # see what a method answers
    {
        "diagnosis": "diagnosis",
        "guard.watch": "guard.watch guard.seeing guard.gathering",
        "choosing": "choosing",
    },  # wrap or try any method, and know no trainer
    {"report": "report"},  # reads the files of finished runs, so it stands below what writes them
    {"run": "run"},  # ends with a report
    {"guard.callback": "guard guard.callback"},  # puts a Watch into a run
    {"modules": "modules"},  # make the run and hold it
    {"serving": "serving"},  # answers requests by a method and its source; its example server loads nets as a run does
    {"exporting": "exporting exported_step"},  # reads what a run saved
    {"launch": "launch"},
    {"benchmark": "benchmark"},  # launches runs, and knows no command line
    {"reproduce": "reproduce"},  # runs benchmarks
    {"cli": "cli"},
    {"__main__": "__main__"},
)
APART = (("data", "methods"),)  # on whatever floors: only the run brings them together

ALLOWED = {  # (files, private names of another library), as patterns: why there is no public way
    ("*", "_BatchNorm"): "torch's one base of all BatchNorm layers, without a public name",
    ("*", "_NormBase"): "the same, of all norm layers with running statistics",
    ("*", "_modules"): "puts a layer in the place of another one, also where it is shared and has several names",
    ("*", "_orig_mod"): "what torch.compile has wrapped",
    ("*", "_compiled_call_impl"): "what module.compile() leaves",
    ("*", "_foreach_*"): "one call for many tensors; torch's optimizers use it, under no public name",
    ("lightning_tta/methods/base/optimizers.py", "_fused_*"): "the kernels of torch's optimizers, without their checks",
    ("*", "_pytree"): "the tensors in whatever a net returns; torch has no public module for it",
    ("lightning_tta/modules/adaptation.py", "_data_source"): "the loaders of a user, before Lightning asks them",
    ("lightning_tta/meta/prefix.py", "_version"): "the one sign that a tensor was written in place",
    ("lightning_tta/methods/base/custody.py", "_version"): "the same",
    (
        "lightning_tta/methods/components/refinements.py",
        "_higher_order_ops",
    ): "a loop in a program; torch has no public name for it",
    ("lightning_tta/exported_step.py", "_foreach_*"): "what the exporter has no translation of",
    ("lightning_tta/backbones/casts.py", "_version"): "the same",
    ("lightning_tta/backbones/casts.py", "_parameters"): "what a layer has itself, not what a parametrisation computes",
    ("lightning_tta/backbones/casts.py", "_conv_forward"): "a convolution with other weights, whatever its padding",
    ("lightning_tta/methods/base/first_pass.py", "_version"): "the same",
    ("lightning_tta/methods/base/custody.py", "_parameters"): "what a module has, without a walk through all names",
    ("lightning_tta/methods/base/custody.py", "_buffers"): "the same",
    ("lightning_tta/methods/base/custody.py", "_forward_*"): "what hooks a broken call has left; no handle is at hand",
    ("lightning_tta/methods/base/baked.py", "_version"): "the one sign that a tensor was written in place",
    ("lightning_tta/methods/base/baked.py", "_backward_hooks"): "hooks on a parameter; nothing public tells",
    ("lightning_tta/methods/base/recorder.py", "_has_any_global_hook"): "whether anybody looks inside a pass",
    ("lightning_tta/methods/base/recorder.py", "_get_current_*_mode_stack"): "the same, of modes; nothing public tells",
    ("lightning_tta/methods/base/recorder.py", "_python_dispatch"): "where torch keeps them",
    ("lightning_tta/methods/base/method.py", "_dynamo"): "where torch.compile's settings are documented to be",
    ("lightning_tta/modules/meta_ttt.py", "_layer_sync"): "where Lightning's strategy keeps sync_batchnorm",
    ("lightning_tta/modules/training.py", "_data_fetcher"): "a continued epoch needs a new iterator; no public way",
    ("lightning_tta/run/board.py", "_prefix"): "only log_metrics puts it before a name, one event for each number",
    ("lightning_tta/run/board.py", "_log_hyperparams"): "save_hyperparameters(logger=False) is for the module's author",
    ("lightning_tta/benchmark/runner.py", "_exit"): "os._exit is documented: a worker ends with its parent, at once",
    ("lightning_tta/run/interrupts.py", "_exit"): "the same of a process that is told a second time to end",
    ("lightning_tta/launch/ending.py", "_exit"): "the same of a process whose first process is gone",
    ("*", "_actions"): "argparse has no public list of a parser's options",
}


@dataclass(frozen=True)
class Import:
    """``source``, a module of the package, imports ``target``, another one, in ``line``."""

    source: str
    target: str
    line: int


class Package:
    """The modules of a package and what its files import."""

    def __init__(self, root: Path, name: str, floors: tuple[dict[str, str], ...] = FLOORS) -> None:
        self.name = name
        self.paths = {self._module(path.relative_to(root)): path for path in sorted((root / name).rglob("*.py"))}
        self.files = {module: path.relative_to(root).as_posix() for module, path in self.paths.items()}
        self.trees = {module: ast.parse(path.read_text()) for module, path in self.paths.items()}
        self.rooms = {
            f"{name}.{module}": (floor, room)
            for floor, rooms in enumerate(floors)
            for room, modules in rooms.items()
            for module in modules.split()
        }

    @staticmethod
    def _module(path: Path) -> str:
        return ".".join(path.with_suffix("").parts).removesuffix(".__init__")

    def room(self, module: str) -> tuple[int, str] | None:
        """Floor and room of a module; None where the table has none."""
        while module:
            if module in self.rooms:
                return self.rooms[module]
            module = module.rpartition(".")[0]
        return None

    def imports(self, module: str) -> Iterator[Import]:
        """All imports of modules of this package, also by ``import_module`` with a written name."""
        seen: set[Import] = set()
        for node in ast.walk(self.trees[module]):
            match node:
                case ast.Import(names=names):
                    targets = [alias.name for alias in names]
                case ast.ImportFrom(names=names):
                    base = self._base(module, node)
                    targets = [f"{base}.{alias.name}" for alias in names]
                case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(written)), *_]):
                    targets = [written]
                case _:
                    continue
            for target in targets:
                while target and target not in self.paths:  # a name in a module
                    target = target.rpartition(".")[0]
                if target and (item := Import(module, target, node.lineno)) not in seen:
                    seen.add(item)
                    yield item

    def _base(self, module: str, node: ast.ImportFrom) -> str:
        """The module after ``from``, in full."""
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        if self.paths[module].name == "__init__.py":
            parts.append("__init__")
        return ".".join([*parts[: -node.level], *([node.module] if node.module else [])])


def upward(package: Package, apart: tuple[tuple[str, str], ...] = APART) -> Iterator[str]:
    """Imports from a higher floor, from a neighbour, and of the package itself, which hands on names of all floors."""
    for module in package.paths:
        if module == package.name:
            continue  # its imports are lazy, see test_the_package_is_lazy
        home = package.room(module)
        if home is None:
            yield f"{package.files[module]}:1: {module} has no floor: enter it in FLOORS"
            continue
        for item in package.imports(module):
            place = f"{package.files[module]}:{item.line}: {module} imports {item.target}"
            other = package.room(item.target)
            if item.target == package.name:
                yield f"{place}, which hands on names of all floors: import from the module that defines the name"
            elif other is not None and other[0] > home[0]:
                yield f"{place}: upwards, from {home[1]} to {other[1]}"
            elif other is not None and other[0] == home[0] and other[1] != home[1]:
                yield f"{place}: {home[1]} and {other[1]} stand side by side and do not know each other"
            elif any(
                _inside(package, module, a) and _inside(package, item.target, b) for a, b in (*apart, *_turned(apart))
            ):
                yield f"{place}: these rooms do not import each other"


def _turned(pairs: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    return [(b, a) for a, b in pairs]


def _inside(package: Package, module: str, room: str) -> bool:
    return f"{module}.".startswith(f"{package.name}.{room}.")


def circles(package: Package) -> Iterator[str]:
    """Circles between modules: for each group of modules that reach each other, the lines of one circle."""
    graph: dict[str, dict[str, int]] = {module: {} for module in package.paths}
    for module in package.paths:
        if module != package.name:
            for item in package.imports(module):
                if item.target not in (module, package.name):
                    graph[module].setdefault(item.target, item.line)
    reach = {module: _reachable(graph, module) for module in graph}
    seen: set[str] = set()
    for module in graph:
        if module in reach[module] and module not in seen:
            group = {other for other in reach[module] if module in reach[other]}
            seen |= group
            path = _way(graph, module, group)
            yield (
                "; ".join(f"{package.files[a]}:{graph[a][b]}: {a} imports {b}" for a, b in pairwise(path))
                + f": a circle (among {len(group)} modules)"
            )


def _reachable(graph: dict[str, dict[str, int]], start: str) -> set[str]:
    reached: set[str] = set()
    ahead = list(graph[start])
    while ahead:
        if (module := ahead.pop()) not in reached:
            reached.add(module)
            ahead.extend(graph[module])
    return reached


def _way(graph: dict[str, dict[str, int]], start: str, group: set[str]) -> list[str]:
    """The shortest way from ``start`` back to ``start``."""
    ways = [[start]]
    for way in ways:
        for module in graph[way[-1]]:
            if module == start:
                return [*way, start]
            if module in group and module not in way:
                ways.append([*way, module])
    raise AssertionError("no circle")


def private(package: Package, allowed: dict[tuple[str, str], str] = ALLOWED) -> Iterator[str]:
    """Private names of other modules and objects; see :class:`_Private`."""
    for module, tree in package.trees.items():
        for line, name, what in sorted(_Private(tree, package.name).names):
            if not any(_matches(entry, package.files[module], name) for entry in allowed):
                yield f"{package.files[module]}:{line}: {what}"


def _matches(entry: tuple[str, str], file: str, name: str) -> bool:
    return fnmatchcase(file, entry[0]) and fnmatchcase(name, entry[1])


class _Private(ast.NodeVisitor):
    """A name with one underscore in front is another's, unless it is asked of ``self``, ``cls`` or ``super()``.

    Nor is it another's where a class of this file defines it: ``self.x._y`` is fine only there.
    """

    def __init__(self, tree: ast.Module, package: str) -> None:
        self.package = package
        self.names: list[tuple[int, str, str]] = []
        self.modules: set[str] = set()
        self.defined: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                self.modules |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
            if isinstance(node, ast.ClassDef):
                self.defined |= set(_attributes(node))
        self.visit(tree)

    def _note(self, line: int, name: str, what: str) -> None:
        if name.startswith("_") and not name.startswith("__"):
            self.names.append((line, name, what))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            for part in alias.name.split("."):
                self._note(node.lineno, part, f"imports {alias.name}, a private module")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        for part in module.split("."):
            if f"{self.package}._version" != module:  # where setuptools reads the version
                self._note(node.lineno, part, f"imports {module}, a private module")
        for alias in node.names:
            self._note(node.lineno, alias.name, f"imports {alias.name} of {module}, a private name")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._access(node.lineno, node.value, node.attr)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        match node:
            case ast.Call(
                func=ast.Name(id="getattr" | "setattr" | "hasattr" | "delattr"),
                args=[owner, ast.Constant(value=str(name)), *_],
            ):
                self._access(node.lineno, owner, name)
        self.generic_visit(node)

    def _access(self, line: int, owner: ast.expr, name: str) -> None:
        match owner:
            case ast.Name(id="self" | "cls") | ast.Call(func=ast.Name(id="super")):
                return
            case ast.Call(func=ast.Name(id="type"), args=[ast.Name(id="self")]):
                return
            case ast.Name(id=module) if module in self.modules:
                pass
            case _ if name in self.defined:
                return
        self._note(line, name, f"touches {ast.unparse(owner)}.{name}, a private name of another object")


def _attributes(node: ast.ClassDef) -> Iterator[str]:
    """Names that a class defines: in its body, and on ``self`` or ``cls`` in its methods."""
    for statement in node.body:
        match statement:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.Assign(targets=targets):
                yield from (target.id for target in targets if isinstance(target, ast.Name))
    for inner in ast.walk(node):
        match inner:
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                yield name


def eager(tree: ast.Module) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that run when the module is imported: outside functions and ``TYPE_CHECKING``."""
    ahead: list[ast.stmt] = list(tree.body)
    while ahead:
        node = ahead.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            ahead.extend(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for block in ("body", "orelse", "finalbody"):
                ahead.extend(getattr(node, block, []))
            ahead.extend(statement for handler in getattr(node, "handlers", []) for statement in handler.body)


def assert_none(violations: Iterator[str]) -> None:
    if lines := list(violations):
        pytest.fail("\n".join(lines), pytrace=False)


@pytest.fixture(scope="module")
def package():
    return Package(ROOT, PACKAGE)


def test_no_import_runs_upwards(package):
    assert_none(upward(package))


def test_there_is_no_circle(package):
    assert_none(circles(package))


def test_nobody_touches_a_private_name_of_another(package):
    assert_none(private(package))


def test_every_exception_is_needed_and_names_nothing_of_ours(package):
    for module, tree in package.trees.items():
        ours = {name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for name in _attributes(node)}
        assert [(e, n) for e in ALLOWED for n in ours if _matches(e, package.files[module], n)] == []
    used = [
        (package.files[m], name) for m, tree in package.trees.items() for _, name, _ in _Private(tree, PACKAGE).names
    ]
    assert [entry for entry in ALLOWED if not any(_matches(entry, *one) for one in used)] == []


def test_the_table_names_what_there_is(package):
    assert sorted(room for room in package.rooms if room not in package.paths) == []


def test_the_package_is_lazy(package):
    light = {f"{PACKAGE}._version", f"{PACKAGE}.errors"}
    for node in eager(package.trees[PACKAGE]):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        for name in names:
            assert name in light or name.partition(".")[0] in sys.stdlib_module_names, f"line {node.lineno}: {name}"
    code = "import sys, lightning_tta; print([m for m in ('torch', 'lightning', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


# The walker itself, on a house of three floors

SMALL: tuple[dict[str, str], ...] = ({"ground": "errors tools"}, {"left": "left", "right": "right"}, {"top": "top"})


def house(tmp_path, **files):
    """A package ``pkg`` of these files (``__`` in a name stands for a slash)."""
    for name in {"__init__", "errors", "tools", "left____init__", "left__room", "right", "top", *files}:
        path = tmp_path / "pkg" / f"{name.replace('____init__', '/__init__').replace('left__', 'left/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files.get(name, ""))
    return Package(tmp_path, "pkg", SMALL)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("errors", "import os\nfrom pkg.top import x\n", "pkg/errors.py:2: pkg.errors imports pkg.top: upwards"),
        ("errors", "import pkg.top\n", "pkg/errors.py:1: pkg.errors imports pkg.top: upwards, from ground to top"),
        ("errors", "from pkg import top\n", "pkg/errors.py:1: pkg.errors imports pkg.top: upwards"),
        ("left__room", "def f():\n    from pkg.top import x\n", "pkg/left/room.py:2: pkg.left.room imports pkg.top"),
        (
            "left__room",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..top import x\n",
            "pkg/left/room.py:3: pkg.left.room imports pkg.top: upwards, from left to top",
        ),
        ("left____init__", "from ..top import x\n", "pkg/left/__init__.py:1: pkg.left imports pkg.top: upwards"),
        (
            "errors",
            "import importlib\nimportlib.import_module('pkg.top')\n",
            "pkg/errors.py:2: pkg.errors imports pkg.top",
        ),
        (
            "left__room",
            "\nfrom pkg.right import x\n",
            "pkg/left/room.py:2: pkg.left.room imports pkg.right: left and right",
        ),
        ("top", "from pkg import x\n", "pkg/top.py:1: pkg.top imports pkg, which hands on"),
        ("attic", "x = 1\n", "pkg/attic.py:1: pkg.attic has no floor"),
    ],
)
def test_an_arrow_upwards_is_named(tmp_path, name, text, line):
    (violation,) = upward(house(tmp_path, **{name: text}), ())
    assert violation.startswith(line)


def test_rooms_that_are_kept_apart_are_named_in_both_directions(tmp_path):
    small = house(tmp_path, top="from pkg.left.room import x\n")
    assert list(upward(small, ())) == []
    for apart in (("top", "left"), ("left", "top")):
        (violation,) = upward(small, (apart,))
        assert violation.startswith("pkg/top.py:1: pkg.top imports pkg.left.room: these rooms")


def test_arrows_downwards_and_within_a_room_are_fine(tmp_path):
    small = house(
        tmp_path,
        __init__="from pkg.top import x\n",
        errors="from pkg.tools import x\n",
        top="import numpy\nfrom pkg.left import room\nfrom pkg import errors\n",
        left__room="from pkg.errors import x\n",
        left____init__="from pkg.left.room import x\n",
    )
    assert [*upward(small, ()), *circles(small)] == []


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"errors": "import os\nfrom pkg.tools import x\n", "tools": "def f():\n    import pkg.errors\n"},
            (
                "pkg/errors.py:2: pkg.errors imports pkg.tools",
                "pkg/tools.py:2: pkg.tools imports pkg.errors",
                "2 modules",
            ),
        ),
        (
            {"left____init__": "from pkg.left.room import x\n", "left__room": "\nfrom pkg.left import y\n"},
            (
                "pkg/left/__init__.py:1: pkg.left imports pkg.left.room",
                "pkg/left/room.py:2: pkg.left.room imports pkg.left",
            ),
        ),
        (
            {"errors": "import pkg.tools\n", "tools": "import pkg.right\n", "right": "import pkg.errors\n"},
            ("pkg/right.py:1: pkg.right imports pkg.errors", "3 modules"),
        ),
    ],
)
def test_a_circle_is_named(tmp_path, files, words):
    (violation,) = circles(house(tmp_path, **files))
    assert all(word in violation for word in words)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("import os\nfrom pkg.tools import _x\n", "2: imports _x of pkg.tools"),
        ("import torch._ops\n", "1: imports torch._ops, a private module"),
        ("from torch._ops import ops\n", "1: imports torch._ops, a private module"),
        ("from pkg import tools\n\ntools._x()\n", "3: touches tools._x"),
        ("import tools\nclass A:\n    _x = 1\ntools._x\n", "4: touches tools._x"),
        ("def f(net):\n    return net._x\n", "2: touches net._x"),
        ("class A:\n    def f(self):\n        return self.net._x\n", "3: touches self.net._x"),
        ("def f(net):\n    net._x = 1\n", "2: touches net._x"),
        ("def f(net):\n    return getattr(net, '_x', None)\n", "2: touches net._x"),
        ("def f(net):\n    return net.__dict__, net._x\n", "2: touches net._x"),
    ],
)
def test_a_private_name_of_another_is_named(tmp_path, text, line):
    small = house(tmp_path, errors=text)
    (violation,) = private(small, {})
    assert violation.startswith(f"pkg/errors.py:{line}")
    name = "_ops" if "_ops" in text else "_x"
    assert list(private(small, {("pkg/errors.py", name): "for a reason"})) == []
    assert list(private(small, {("pkg/tools.py", name): "elsewhere"})) == [violation]


def test_what_an_object_has_itself_is_its_own(tmp_path):
    text = """
from pkg._version import __version__
class A(B):
    _shared = 1
    def __init__(self, other):
        self._x = other._shared
        self.inherited = super()._y, self._z, type(self)._shared, self.__class__.__name__
    def f(self, others):
        return [other._x for other in others]
def g(a):
    return a._x
"""
    assert list(private(house(tmp_path, errors=text), {})) == []


def test_lazy_imports_are_told_from_eager_ones():
    text = """
import os
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import torch
else:
    import numpy
try:
    import lightning
except ImportError:
    import timm
def f():
    import scipy
class A:
    import rich
"""
    names = {a.name for node in eager(ast.parse(text)) if isinstance(node, ast.Import) for a in node.names}
    assert names == {"os", "numpy", "lightning", "timm", "rich"}


def lines_of_code(path: Path) -> int:
    """Lines of a file without those that are blank, a comment or a docstring."""
    text = path.read_text()
    docs = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False)
        for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    }
    nothing = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in nothing]
    return len({line for t in tokens for line in range(t.start[0], t.end[0] + 1)} - docs)


def test_a_method_is_a_short_file():
    lines = {path.stem: lines_of_code(path) for path in (ROOT / PACKAGE / "methods").glob("*.py")}
    assert lines["tent"] > 15
    assert {name: count for name, count in lines.items() if count > 150} == {}, (
        "move what is no rule of it to components/"
    )
