"""The version has one place, `lorvp.__version__`; what repeats it agrees."""

from __future__ import annotations

import tomllib

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

import lorvp
from cluster.snapshot import CHECKOUT
from sweeps import launch


def test_the_package_takes_it_from_there():
    settings = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    assert settings["project"]["dynamic"] == ["version"]
    assert settings["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "lorvp.__version__"}


def test_the_citation_has_it():
    citation = YAML(typ="safe").load(CHECKOUT / "CITATION.cff")
    assert citation["version"] == lorvp.__version__


@pytest.mark.parametrize("arguments", [["--version"], ["no-such-spec.yaml", "--version"]])
def test_the_command_says_it(arguments):
    shown = CliRunner().invoke(launch.app, arguments)
    assert shown.exit_code == 0
    assert shown.output == f"lorvp-sweep {lorvp.__version__}\n"
