"""The documentation as a site (`make docs`): every page is in it, and so is the API, by its docstrings."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from ruamel.yaml import YAML

from cluster.snapshot import CHECKOUT, PACKAGES


def pages(nav: list | dict | str) -> set[str]:
    """The files that a part of mkdocs.yml's nav names."""
    if isinstance(nav, str):
        return {nav}
    return set().union(*map(pages, nav.values() if isinstance(nav, dict) else nav))


def test_the_nav_has_every_page():
    docs = CHECKOUT / "docs"
    nav = YAML(typ="safe").load(CHECKOUT / "mkdocs.yml")["nav"]
    assert pages(nav) == {str(path.relative_to(docs)) for path in docs.rglob("*.md")}


def test_the_index_leads_to_every_page():
    docs = CHECKOUT / "docs"
    linked = set(re.findall(r"\]\(([\w/]+\.md)\)", (docs / "index.md").read_text()))
    assert linked | {"index.md"} == {str(path.relative_to(docs)) for path in docs.rglob("*.md")}


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for package in PACKAGES:
        page = (tmp_path / "api" / f"{package}.html").read_text()
        for path in (CHECKOUT / package).rglob("[a-z]*.py"):
            module = ".".join(path.relative_to(CHECKOUT).with_suffix("").parts)
            assert f'id="{module}' in page, f"the API has nothing of {module}"
