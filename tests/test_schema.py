"""The schemas by which editors check YAML files say what the readers of those files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from ruamel.yaml import YAML

from cluster.profile import PROFILES
from sweeps import results, schema

SWEEPS = Path(schema.__file__).parent


def read(path: Path) -> dict[str, Any]:
    return YAML(typ="safe").load(path.read_text())


@pytest.mark.parametrize(
    ("path", "made"),
    [(schema.SPEC_SCHEMA, schema.spec_schema()), (schema.PROFILE_SCHEMA, schema.profile_schema())],
    ids=["spec", "profile"],
)
def test_what_is_kept_is_what_the_models_say(path, made):
    """python -m sweeps.schema makes them again."""
    Draft202012Validator.check_schema(made)
    assert path.read_text() == schema.text(made)


FILES = {*SWEEPS.glob("*.yaml"), *PROFILES.glob("*.yaml")} - {results.FIGURES}


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
        ("trial", "label_mapping", "lpp"),
        ("space", "prompt.rnk", {"choice": [1]}),
        ("search", "algorithm", "hyperband"),
    ],
)
def test_what_is_wrong_is_marked(where, key, value):
    values = read(SWEEPS / "quickstart.yaml")
    values[where][key] = value
    assert list(Draft202012Validator(schema.spec_schema()).iter_errors(values))
