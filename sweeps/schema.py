"""python -m sweeps.schema: JSON schemas of specs and profiles, by which editors complete and check the YAML files.

They are made from the pydantic models and kept beside the files that they are for, whose first line names them. So is
docs/spec.md, for people.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from cluster.profile import PROFILES, Profile
from lorvp import presets
from lorvp.config import TrialConfig
from lorvp.parts import ROOMS, Part, kinds
from lorvp.utils import cli, plugins
from lorvp.utils.files import replacing
from sweeps.spec import reference
from sweeps.spec.file import dotted_keys, parts_within
from sweeps.spec.model import Spec

SPEC_SCHEMA = Path(__file__).parent / "spec.schema.json"
PROFILE_SCHEMA = PROFILES / "profile.schema.json"
REFERENCE = Path(__file__).parent.parent / "docs" / "spec.md"


def spec_schema() -> dict[str, Any]:
    """Make the schema of a sweep's YAML file.

    `trial` has the keys of TrialConfig, none of them required, as the space gives the rest; `space` and `control` have
    them by dotted path. A prompt, an adapter and a head have the keys of all their kinds, as the kind may be an axis.
    """
    schema, trial = Spec.model_json_schema(by_alias=True), trial_schema()
    definitions = schema.setdefault("$defs", {}) | trial.pop("$defs")
    for key, room in ROOMS.items():
        part = trial["properties"][key]
        models = [definitions.pop(kind.__name__) for kind in kinds(key).values()]
        for field in ("oneOf", "discriminator", "default"):
            part.pop(field, None)
        part |= _any_of_kinds(models, list(plugins.names(room)))
    for part in (trial, *(definitions[name] for name in _parts_of_trial(TrialConfig) if name in definitions)):
        part.pop("required", None)
    schema["$defs"] = definitions | {"TrialConfig": trial}
    properties = schema["properties"]
    properties["trial"] = {"$ref": "#/$defs/TrialConfig", "description": properties["trial"]["description"]}
    keys = {"enum": dotted_keys(TrialConfig)}
    properties["space"]["propertyNames"] = keys
    axis = properties["space"]["additionalProperties"]
    properties["space"]["additionalProperties"] = {"anyOf": [axis, {"type": "array", "items": axis}]}
    for choice in (properties["control"], *properties["control"].get("anyOf", [])):
        if choice.get("type") == "object":
            choice["propertyNames"] = keys
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema


def _any_of_kinds(models: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """Return the schema of a mapping with the keys of several kinds, whose values may be any kind's."""
    values: dict[str, list[dict[str, Any]]] = {}
    for model in models:
        for key, value in model["properties"].items():
            if value not in values.setdefault(key, []):
                values[key].append(value)
    properties = {key: options[0] if len(options) == 1 else {"anyOf": options} for key, options in values.items()}
    properties["kind"] = {"enum": names, "type": "string"}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def trial_schema() -> dict[str, Any]:
    """Make the schema of a TrialConfig, with the names of the presets that there are."""
    trial = TrialConfig.model_json_schema()
    text, _ = trial["properties"]["method"]["anyOf"]  # or null, as by default
    text["examples"] = presets.names()
    return trial


def profile_schema() -> dict[str, Any]:
    """Of a profile of `cluster/profiles`, or of the user's own."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Profile.model_json_schema()


def _parts_of_trial(model: type[Part]) -> set[str]:
    """Return the models that a config has as the value of a key."""
    within = [kind for field in model.model_fields.values() for kind in parts_within(field)]
    return {kind.__name__ for kind in within}.union(*map(_parts_of_trial, within))


def to_json(schema: dict[str, Any]) -> str:
    """Format a schema as the text of its file."""
    return json.dumps(schema, indent=1, default=str) + "\n"


def generated_files() -> dict[Path, str]:
    """Return every file that is made here, as it must be."""
    spec, profile = spec_schema(), profile_schema()
    return {
        SPEC_SCHEMA: to_json(spec),
        PROFILE_SCHEMA: to_json(profile),
        REFERENCE: reference.page(spec, trial_schema(), profile),
    }


def main() -> None:
    """Write the schemas to where the YAML files look for them, and the page that says the same."""
    for path, content in generated_files().items():
        with replacing(path) as temporary:
            temporary.write_text(content)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    cli.run(app)
