"""The schemas by which editors check YAML files say what the readers of those files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from ruamel.yaml import YAML

from cluster.profile import PROFILES, Profile
from lorvp.config import TrialConfig
from sweeps import schema
from sweeps.results import rows
from sweeps.spec.file import dotted_keys
from sweeps.spec.model import Spec

SWEEPS = Path(schema.__file__).parent


def read(path: Path) -> dict[str, Any]:
    return YAML(typ="safe").load(path.read_text())


@pytest.mark.parametrize(
    ("path", "made"), schema.generated_files().items(), ids=lambda value: getattr(value, "name", "")
)
def test_what_is_kept_is_what_the_models_say(path, made):
    """python -m sweeps.schema makes them again."""
    assert path.read_text() == made
    if path.suffix == ".json":
        Draft202012Validator.check_schema(json.loads(made))


def test_every_key_is_in_the_reference():
    page = schema.REFERENCE.read_text()
    for key in [*dotted_keys(TrialConfig), *dotted_keys(Spec), *dotted_keys(Profile)]:
        assert f"| `{key}` |" in page
    assert "| value |" not in page.replace("| key | value |", "")  # every type has a word


FILES = {*SWEEPS.glob("*.yaml"), *PROFILES.glob("*.yaml")} - {rows.PUBLISHED_PATH}


@pytest.mark.parametrize("path", sorted(FILES), ids=lambda path: path.stem)
def test_every_file_names_its_schema_and_fits_it(path):
    first = path.read_text().splitlines()[0]
    named = path.parent / first.removeprefix("# yaml-language-server: $schema=")
    assert not list(Draft202012Validator(json.loads(named.read_text())).iter_errors(read(path)))


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        ("trial", "optimzer", {"lr": 1}),
        ("trial", "epochs", 0),
        ("trial", "label_mapping", "lp"),
        ("trial", "head", {"kind": "lpp"}),
        ("trial", "head", {"fit": "most"}),
        ("trial", "prompt", {"kind": "border", "pad": 0}),
        ("trial", "adapter", {"knid": "vpt"}),
        ("trial", "rungs", [{"image_size": 16}]),
        ("space", "rungs.epochs", {"choice": [1]}),
        ("control", "label_mapping", "lp"),
        ("space", "prompt.rnk", {"choice": [1]}),
        ("search", "algorithm", "hyperband"),
    ],
)
def test_what_is_wrong_is_marked(where, key, value):
    values = read(SWEEPS / "quickstart.yaml")
    values.setdefault(where, {})[key] = value
    assert list(Draft202012Validator(schema.spec_schema()).iter_errors(values))
