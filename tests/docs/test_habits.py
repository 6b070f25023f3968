"""What contributors are told, what a commit checks and what CI runs are the Makefile's own commands."""

from __future__ import annotations

import re

import pytest
from ruamel.yaml import YAML

from cluster.snapshot import CHECKOUT
from lorvp.config import EARLIER, TrialConfig
from sweeps.spec.file import dotted_keys

MAKEFILE = (CHECKOUT / "Makefile").read_text()


def commands_of(target: str) -> list[str]:
    """The lines that make runs for a target."""
    lines = re.search(rf"^{target}: \$\(INSTALLED\)\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    return [line.strip() for line in lines[1].splitlines()]


def read_yaml(name: str) -> dict:
    return YAML(typ="safe").load(CHECKOUT / name)


def test_a_commit_is_checked_by_the_tools_of_make_check():
    hooks = read_yaml(".pre-commit-config.yaml")["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == commands_of("check")


def test_ci_runs_make_test():
    steps = read_yaml(".github/workflows/ci.yml")["jobs"]["test"]["steps"]
    assert any(re.search(r"\bmake test$", step.get("run", "")) for step in steps)
    for action in (step["uses"] for step in steps if "uses" in step):
        assert re.fullmatch(r"[\w/-]+@v\d+\.\d+\.\d+", action), f"{action}: name a version, not a branch"


def test_contributing_names_targets_that_exist():
    named = re.findall(r"(?:`|^    )make ([\w-]+)", (CHECKOUT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert {"install", "check", "test", "test-quick", "coverage", "docs"} <= set(named)
    for target in named:
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target


def changes() -> str:
    return (CHECKOUT / "CHANGELOG.md").read_text()


def test_the_changelog_begins_with_what_is_unreleased():
    assert re.findall(r"^## (.+)$", changes(), re.MULTILINE)[0] == "[Unreleased]"


@pytest.mark.parametrize("part", re.split(r"^## ", changes(), flags=re.MULTILINE)[1:], ids=lambda part: part.split()[0])
def test_a_version_sorts_its_changes(part):
    kinds = re.findall(r"^### (.+)$", part, re.MULTILINE)
    known = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    assert set(kinds) <= set(known)
    assert len(kinds) == len(set(kinds)) > 0


def test_the_changelog_says_what_is_written_in_place_of_each_earlier_key():
    rows = re.findall(r"^ *\| (`.+) \| (.+) \|$", changes(), re.MULTILINE)
    key = re.compile(r"`(\w[\w.]*\w)")
    before, now = (set(key.findall(" ".join(column))) for column in zip(*rows, strict=True))
    assert set(EARLIER) <= before
    known = dotted_keys(TrialConfig)
    assert all(any(name == new or name.startswith(f"{new}.") for name in known) for new in now)
