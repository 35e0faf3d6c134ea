"""Tests of the project itself: its names, its wheel, its layers, its prose."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

import edgepet
from edgepet.cli.main import VERBS, load
from edgepet.cli.options import Parser
from edgepet.verbs.verb import Group
from tests.public_api import REVIEWED, public_api

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = sorted(
    path for folder in ("edgepet", "exporters", "calibration") for path in (ROOT / folder).rglob("*.py")
    if not path.is_relative_to(ROOT / "edgepet" / "exporters")
    and not path.is_relative_to(ROOT / "edgepet" / "calibration")
)  # fmt: skip
PAGES = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not any(part.startswith(".") or part in ("build", "dist") for part in path.relative_to(ROOT).parts)
]


SUITE = sorted((ROOT / "tests").rglob("*.py"))


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


# Public names


def test_the_public_names_and_signatures_are_the_reviewed_ones() -> None:
    """A change is accepted by ``python -m tests.public_api``."""
    assert public_api() == REVIEWED.read_text()


def test_dir_lists_exactly_the_public_names() -> None:
    assert dir(edgepet) == sorted(edgepet.__all__)
    assert len(set(edgepet.__all__)) == len(edgepet.__all__)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"^module 'edgepet' has no attribute 'unmerge'$"):
        _ = edgepet.unmerge


@pytest.mark.parametrize(
    ("old", "name", "home"),
    [
        ("graph", "open_graph", "edgepet.graphs.base"),
        ("store", "Store", "edgepet.device.store"),
        ("imaging", "load_pixels", "edgepet.images.preprocess"),
        ("runtime", "open_task", "edgepet.device.runtime"),
        ("int8", "open_int8", "edgepet.graphs.int8"),
    ],
)
def test_modules_that_guides_had_named_answer_with_a_warning(
    old: str, name: str, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, f"edgepet.{old}", raising=False)

    with pytest.warns(DeprecationWarning, match=rf"^edgepet\.{old} is {home} now$"):
        module = importlib.import_module(f"edgepet.{old}")

    assert getattr(module, name) is getattr(importlib.import_module(home), name)


# The package


def test_the_version_is_said_once_and_the_same() -> None:
    assert PROJECT["project"]["version"] == edgepet.__version__


def test_a_device_needs_five_packages() -> None:
    names = [re.match(r"[A-Za-z0-9_.-]+", line)[0] for line in PROJECT["project"]["dependencies"]]
    assert names == ["numpy", "onnxruntime", "safetensors", "Pillow", "rich"]


@pytest.mark.parametrize("name", ["exporters", "calibration"])
def test_the_folders_at_the_top_are_parts_of_the_package(name: str) -> None:
    link = ROOT / "edgepet" / name

    assert link.is_symlink()
    assert str(link.readlink()) == f"../{name}"
    assert (ROOT / name / "__init__.py").is_file()
    assert PROJECT["tool"]["setuptools"]["package-dir"][f"edgepet.{name}"] == name


def test_a_wheel_holds_the_package_and_nothing_beside_it(tmp_path: Path) -> None:
    for module in ("setuptools", "build"):
        pytest.importorskip(module, reason=f"needs the package {module}")
    copy = tmp_path / "source"  # building writes build/ and egg-info into the tree
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("edgepet", "exporters", "calibration"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(copy)]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"edgepet-{edgepet.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    info = f"edgepet-{edgepet.__version__}.dist-info/"
    modules = {name for name in names if not name.startswith(info)}
    expected = {named(path) for path in SOURCES if path.is_relative_to(ROOT / "edgepet")}
    expected |= {f"edgepet/{named(path)}" for path in SOURCES if not path.is_relative_to(ROOT / "edgepet")}
    assert modules == expected | {"edgepet/py.typed"}
    assert {"edgepet/exporters/onnx.py", "edgepet/calibration/__init__.py", "edgepet/cli/main.py"} <= modules
    assert f"{info}licenses/LICENSE" in names


def test_imports_go_down_only() -> None:
    pytest.importorskip("importlinter", reason="needs the package import-linter")
    code = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"

    done = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Contracts: {len(PROJECT['tool']['importlinter']['contracts'])} kept, 0 broken." in done.stdout


# The source


def found(kind: type[ast.AST], path: Path) -> Iterator[Any]:
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return (node for node in ast.walk(tree) if isinstance(node, kind))


def test_there_are_sources_to_look_at() -> None:
    names = {named(path) for path in SOURCES}
    assert {"edgepet/cli/main.py", "edgepet/methods/lora.py", "exporters/onnx.py", "calibration/__init__.py"} <= names
    assert len(names) == len(SOURCES)


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_no_source_asserts_or_prints(path: Path) -> None:
    asserts = [node.lineno for node in found(ast.Assert, path)]
    prints = [
        node.lineno for node in found(ast.Call, path) if isinstance(node.func, ast.Name) and node.func.id == "print"
    ]

    assert (asserts, prints) == ([], [])


FUNCTION_LINES, FILE_LINES = 60, 400
LONGER: set[str] = set()  # at most ten, each with its reason; there is none today


def longer(path: Path) -> Iterator[str]:
    """The file, and the functions in it, that are longer than a reader should meet without a reason."""
    if len(path.read_text(encoding="utf-8").splitlines()) > FILE_LINES:
        yield named(path)
    for node in (*found(ast.FunctionDef, path), *found(ast.AsyncFunctionDef, path)):
        if node.end_lineno - node.lineno + 1 > FUNCTION_LINES:
            yield f"{named(path)}:{node.name}"


def test_no_source_is_longer_than_a_reader_should_meet() -> None:
    assert {place for path in SOURCES for place in longer(path)} == LONGER
    assert len(LONGER) <= 10


def undocumented(body: list[ast.stmt], where: str) -> Iterator[str]:
    """Public classes, functions and methods below ``body`` that have no docstring."""
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                yield f"{where}.{node.name}"
            if isinstance(node, ast.ClassDef):
                yield from undocumented(node.body, f"{where}.{node.name}")


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_everything_public_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))

    assert ast.get_docstring(tree)
    assert list(undocumented(tree.body, named(path))) == []


def errors_in(path: Path) -> Iterator[str]:
    """The texts of a file that end up in messages: all but docstrings and comments."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = [node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    docstrings = {id(node.body[0].value) for node in documented if ast.get_docstring(node)}  # type: ignore[attr-defined]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


LIBRARY = [path for path in SOURCES if not named(path).startswith(("edgepet/cli/", "edgepet/verbs/"))]
# Whole commands to paste, keys of a checkpoint that older files have, Markdown's right-aligned columns, CSS variables.
WITH_FLAGS = re.compile(r"edgepet |pip install|^--set $|^---:?$|var\(--")


def test_the_library_speaks_of_fields_and_not_of_flags() -> None:
    told = {
        f"{named(path)}: {text}"
        for path in LIBRARY
        for text in errors_in(path)
        if re.search(r"(?<![\w-])--[a-z]", text) and not WITH_FLAGS.search(text)
    }
    assert told == set()


def test_every_field_in_a_message_is_one_that_a_verb_fills() -> None:
    fields = {action.dest for name in VERBS for action in options_of(name)}
    named_fields = {
        node.args[0].value
        for path in SOURCES
        for node in found(ast.Call, path)
        if isinstance(node.func, ast.Name) and node.func.id == "option" and isinstance(node.args[0], ast.Constant)
    }
    assert len(named_fields) > 25
    assert named_fields - fields == set()


# The command line


def options_of(verb: str) -> list[argparse.Action]:
    loaded, found = load(verb), list[argparse.Action]()
    for each in [action for action, _ in loaded.actions.values()] if isinstance(loaded, Group) else [loaded]:
        parser = Parser(prog=verb, add_help=False)
        each.options(parser)
        found += parser._actions
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_says_what_it_does_and_its_default(verb: str) -> None:
    silent = [action.dest for action in options_of(verb) if not action.help]
    optional = [action for action in options_of(verb) if action.option_strings and not action.required]
    without = [action.dest for action in optional if "default" not in str(action.help)]
    assert silent == []
    assert without == []


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_no_source_catches_every_exception_without_a_reason(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    broad = []
    for node in found(ast.ExceptHandler, path):
        caught = "everything" if node.type is None else ast.unparse(node.type)
        cleans_up = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
        reason = re.search(r":  # (noqa: \w+ )?\w+ \w+", lines[node.lineno - 1])
        if caught in ("everything", "Exception", "BaseException") and not (cleans_up or reason):
            broad.append(f"{named(path)}:{node.lineno}")
    assert broad == []


# The tests

PATCHES = {"setattr", "delattr", "setitem", "delitem", "patch", "object"}  # pytest's, the builtins, and unittest.mock's


def is_private(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last.startswith("_") and not last.endswith("__")  # what has two at both ends is Python's


def is_anothers(name: str) -> bool:
    return name.startswith("tests.test_") or (name.startswith("edgepet.") and is_private(name))


def imported(node: ast.AST) -> Iterator[str]:
    """The modules and names that an import asks for, with dots between."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        room = "tests" if node.level else ""
        home = ".".join(part for part in (room, node.module) if part)
        yield from (f"{home}.{alias.name}" for alias in node.names)


def patched(call: ast.Call) -> Iterator[str]:
    """The names that a call patches, where it does."""
    called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if called in PATCHES:
        first, second = (*call.args, None, None)[:2]
        yield from (
            part.value for part in (first, second) if isinstance(part, ast.Constant) and type(part.value) is str
        )
        if isinstance(first, ast.Attribute):
            yield first.attr


def shortcuts(path: Path) -> Iterator[str]:
    """What goes around the names that others have, with its line; a call may say why in a comment beside it."""
    with tokenize.open(path) as file:
        tokens = list(tokenize.generate_tokens(file.readline))
    commented = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    for node in found(ast.AST, path):
        told = [f"imports {name}" for name in imported(node) if is_anothers(name)]
        if isinstance(node, ast.Attribute) and node.attr == "__code__":
            told.append("__code__")
        if isinstance(node, ast.Call) and commented.isdisjoint(range(node.lineno, node.end_lineno + 1)):
            if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
                told.append(f"{node.func.id}(")
            told += [f"patches {name}" for name in patched(node) if is_private(name)]
        yield from (f"{path.name}:{node.lineno}: {each}" for each in told)


@pytest.mark.parametrize("path", SUITE, ids=named)
def test_no_test_goes_around_what_others_are_given(path: Path) -> None:
    """A patch of a private name needs its reason beside it: a machine that is not here, say."""
    assert list(shortcuts(path)) == []


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("x = eval('1')", "eval("),
        ("exec('x = 1')", "exec("),
        ("names = f.__code__.co_varnames", "__code__"),
        ("from tests.test_methods import vit", "imports tests.test_methods.vit"),
        ("from tests import test_methods", "imports tests.test_methods"),
        ("from .test_methods import vit", "imports tests.test_methods.vit"),
        ("import tests.test_methods", "imports tests.test_methods"),
        ("from edgepet.tuning.fit import _images", "imports edgepet.tuning.fit._images"),
        ("monkeypatch.setattr('edgepet.tuning.fit._judge', f)", "patches edgepet.tuning.fit._judge"),
        ("monkeypatch.setattr(trace, '_traced', f)", "patches _traced"),
        ("monkeypatch.setitem(graft._KINDS, 'conv-pair', f)", "patches _KINDS"),
        ("setattr(module, '_x', 1)", "patches _x"),
        ("exec('x = 1')  # it is the subject", None),
        ("monkeypatch.setattr(cuda, '_driver', f)  # no machine here is without one", None),
        ("monkeypatch.setattr(Runner, '__call__', f)", None),
        ("monkeypatch.setitem(sys.modules, 'torch', None)", None),
        ("model.eval()", None),
        ("from tests.methods import EXAMPLES", None),
    ],
)
def test_what_goes_around_is_seen(line: str, told: str | None, tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(f"{line}\n")

    assert list(shortcuts(tmp_path / "test_x.py")) == ([] if told is None else [f"test_x.py:1: {told}"])


# The prose


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_every_relative_link_of_a_page_resolves(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(<?([^)>\s]+)>?(?:\s+\"[^\"]*\")?\)", text) + re.findall(
        r"(?:src|href)=\"([^\"]+)\"", text
    )
    relative = [unquote(target.partition("#")[0]) for target in targets if not re.match(r"[a-z]+:|#", target)]

    assert [target for target in relative if not (path.parent / target).exists()] == []
