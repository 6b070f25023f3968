"""docs/architecture.md and docs/glossary.md: what they name is there, and nothing that is there is left out."""

from __future__ import annotations

import ast
import re
import tomllib

import pytest

from cluster.snapshot import CHECKOUT, PACKAGES
from lorvp.parts import ROOMS
from lorvp.utils import plugins

PAGE = (CHECKOUT / "docs" / "architecture.md").read_text()
CODE, RUNS = PAGE.split("\n## The folders\n")
SPANS = list(dict.fromkeys(re.findall(r"`([^`\n]+)`", CODE)))
PATHS = [span for span in SPANS if re.fullmatch(r"[\w./]+", span) and ("/" in span or span.endswith((".toml", ".md")))]
PLACES = re.findall(r"`([\w.]+)`\s+\(`([\w/]+\.py)`\)", CODE)
"""A class or function, and its file."""
CONTRACTS = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_exists(path):
    assert (CHECKOUT / path).exists()
    assert (CHECKOUT / path).is_dir() == path.endswith("/")


@pytest.mark.parametrize(("name", "path"), dict.fromkeys(PLACES))
def test_a_name_is_in_its_file(name, path):
    nodes: list[ast.AST] = [ast.parse((CHECKOUT / path).read_text())]
    for part in name.split("."):
        nodes = [
            child
            for node in nodes
            for child in ast.iter_child_nodes(node)
            if isinstance(child, ast.ClassDef | ast.FunctionDef) and child.name == part
        ]
    assert nodes, f"{path} has no {name}"


def test_no_name_stands_without_its_file():
    assert len(PLACES) > 25
    bare = set(re.findall(r"`([A-Z]\w+(?:\.\w+)?)`", CODE)) - {name for name, _ in PLACES}
    assert not bare


def test_every_package_has_its_line():
    """The folders of kinds have one together, their room's: a new kind changes no other file."""
    rooms = {CHECKOUT / room.replace(".", "/") for room in ROOMS.values()}
    packages = {
        f"{folder.relative_to(CHECKOUT)}/"
        for package in PACKAGES
        for folder in [CHECKOUT / package, *(CHECKOUT / package).rglob("*")]
        if (folder / "__init__.py").exists() and folder.parent not in rooms
    }
    assert set(re.findall(r"^\| `(\w[\w/]*/)` \|", CODE, re.MULTILINE)) == packages


def test_a_part_of_a_trial_has_its_line():
    lines = re.findall(r"^\| `(\w+)` \| `([\w/]+)/` \| .*? `(\w+)` .*? \| .*? `(\w+)` ", CODE, re.MULTILINE)
    assert {key: folder.replace("/", ".") for key, folder, *_ in lines} == ROOMS
    for key, folder, options, code in lines:
        for name in plugins.names(ROOMS[key]):
            for module in (CHECKOUT / folder / name).glob("[a-z]*.py"):
                bases = plugins.load(f"{ROOMS[key]}.{name}.{module.stem}").__mro__
                assert (options if module.stem == "config" else code) in {base.__name__ for base in bases}


def drawn(storey: str) -> list[set[str]]:
    """The layers of a package as the drawing has them, from the top."""
    lines = re.search(rf"^{storey} .*\n(?: .*\n)*", PAGE, re.MULTILINE)[0].splitlines()
    return [set(line[11:59].split()) for line in lines]


@pytest.mark.parametrize("storey", ["sweeps", "lorvp"])
def test_the_drawing_has_the_layers_of_the_contracts(storey):
    (contract,) = (contract for contract in CONTRACTS if contract.get("containers") == [storey])
    assert drawn(storey) == [set(layer.split(" | ")) for layer in contract["layers"]]


def test_the_drawing_has_the_storeys_in_order():
    (contract,) = (contract for contract in CONTRACTS if contract["name"].startswith("Three storeys"))
    assert re.findall(r"^(\w+) {2,}", PAGE, re.MULTILINE) == contract["layers"]


def test_the_files_of_a_trial_are_those_of_its_folder():
    of_trial, _ = RUNS.split("The sweep's folder")
    described = ast.get_docstring(ast.parse((CHECKOUT / "cluster" / "trial_folder.py").read_text()))
    named = set(re.findall(r"^ +(\w[\w./]*) {2,}", described, re.MULTILINE))
    assert {
        path.removeprefix("attempts/0001/") or path for path in re.findall(r"^\| `(.+?)` \|", of_trial, re.M)
    } == named


def test_the_files_of_a_sweep_are_written_by_the_code():
    _, of_sweep = RUNS.split("The sweep's folder")
    code = "\n".join(path.read_text() for package in PACKAGES for path in (CHECKOUT / package).rglob("*.py"))
    for path in re.findall(r"^\| `(.+?)` \|", of_sweep, re.MULTILINE):
        assert f'"{path.rstrip("/")}"' in code, path


def test_the_glossary_has_every_word_in_order():
    page = (CHECKOUT / "docs" / "glossary.md").read_text()
    words = re.findall(r"^\*\*([\w ]+)\.\*\*", page, re.MULTILINE)
    assert words == sorted(words)
    wanted = "sweep, trial, job, epoch, stage, rung, rank, label mapping, control, confirmation, bundle, prompt, store"
    more = ("profile", "driver", "adapter", "head", "method", "preset")
    assert {word.capitalize() for word in (*wanted.split(", "), *more)} <= set(words)
    assert set(re.findall(r"^- \*\*(\w+)\*\*", page, re.MULTILINE)) == set(plugins.names(ROOMS["head"]))
