"""docs/spec.md: every key of a sweep's YAML file and of a profile, from the same JSON schemas as editors have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]

TITLE = """\
# The YAML files, key by key

`python -m sweeps.schema` makes this page from the pydantic models (`sweeps/spec/model.py`, `lorvp/config.py` with the
kinds of parts, and `cluster/profile.py`), with the schemas by which editors check these files. A key that is not here
is refused.
"""
SWEEP = """\
`python sweeps/launch.py SPEC` carries it out. `--set KEY=VALUE` replaces a value by its dotted path, as
`--set search.trials=8`.
"""
TRIAL = """\
Under `trial` a sweep has the values that its trials share, a part's as a mapping: `prompt: {lr: 0.02}`. `space` and
`control` name a key by its dotted path, as below: `prompt.lr`. With `--set` it begins with `trial.`, as in
`--set trial.epochs=5`.

A prompt, an adapter and a head have the keys of their kind. In a sweep whose trials have several kinds, a key that one
of the kinds lacks is left out of the trials of that kind. A key without an effect in any trial is refused.
"""
PROFILE = """\
`cluster` in a sweep names one of those in `cluster/profiles`, or the path of your own.
"""
BOUNDS = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}
TYPE_NAMES = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}


def page(sweep: Schema, trial: Schema, profile: Schema) -> str:
    """Return the page as Markdown. `sweep` refers to `trial`, which has a chapter of its own."""
    chapters = (("A sweep", SWEEP, sweep), ("`trial`", TRIAL, trial), ("A profile", PROFILE, profile))
    return "\n".join([TITLE, *(_chapter(*chapter) for chapter in chapters)])


def _chapter(title: str, lead: str, schema: Schema) -> str:
    tables = "\n".join(_sections(schema, schema["$defs"]))
    return f"## {title}\n\n{_in_a_line(schema['description'])}\n{lead}\n{tables}"


def _sections(part: Schema, definitions: Schema, prefix: str = "") -> Iterator[str]:
    """Return a table of the part's keys, then one of each part within it, under a heading."""
    yield _table(part, prefix)
    for key, value in part["properties"].items():
        for path, name in _parts_within(value, prefix + key):
            within = definitions[name]
            if within is part:
                yield f"### `{path}`\n\nThe same keys, but no ranges.\n"
            elif name != "TrialConfig":
                kind = within["properties"].get("kind", {}).get("const")
                heading = path if kind is None else f"{path}` of kind `{kind}"
                yield f"### `{heading}`\n\n{_in_a_line(within['description'])}\n"
                yield from _sections(within, definitions, f"{path}.")


def _table(part: Schema, prefix: str) -> str:
    rows = ["| key | value | default | |", "|---|---|---|---|"]
    for key, value in part["properties"].items():
        description, _, default = value.get("description", "").partition("default: ")
        if not default:
            default = "required" if key in part.get("required", ()) else _default(value)
        cells = (f"`{prefix}{key}`", _value_text(value, prefix + key), default, description.rstrip("; "))
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows) + "\n"


def _default(value: Schema) -> str:
    if "default" not in value or (next(_parts_within(value, ""), None) and value["default"]):
        return ""  # said in the description, or in the part's own table
    return f"`{json.dumps(value['default'], default=str).strip(chr(34))}`"


def _value_text(value: Schema, path: str) -> str:
    """Return the allowed values, in words."""
    if "$ref" in value:
        return f"[its keys](#{_anchor(path)})"
    if "discriminator" in value:
        kinds = value["discriminator"]["mapping"]
        return "its kind's keys: " + ", ".join(f"[{kind}](#{_anchor(f'{path} of kind {kind}')})" for kind in kinds)
    if "anyOf" in value:
        nullable = value.get("default", "") is None  # then it is seen that it may be null
        return " or ".join(
            _value_text(option, path) for option in value["anyOf"] if not (nullable and option == {"type": "null"})
        )
    listed = value.get("enum") or value.get("examples") or ([value["const"]] if "const" in value else [])
    if listed:
        return ", ".join(f"`{option}`" for option in listed)
    kind = value.get("type")
    if kind == "array":
        count = f"{value['minItems']} " if value.get("minItems") == value.get("maxItems", -1) else ""
        within = value.get("items") or value.get("prefixItems", [{}])[0]
        return f"list of {count}{_plural(_value_text(within, f'{path}[]'))}"
    if kind == "object":
        within = value.get("additionalProperties")
        named = isinstance(within, dict) and next(_parts_within(within, path), None) is not None
        return f"mapping: [each one's keys](#{_anchor(f'{path}.KEY')})" if named else "mapping"
    if value.get("format") == "path":
        return "path"
    bounds = [f"{word} {value[bound]:g}" for bound, word in BOUNDS.items() if bound in value]
    return " ".join([TYPE_NAMES.get(str(kind), "`null`" if kind == "null" else "value"), " and ".join(bounds)]).strip()


def _plural(words: str) -> str:
    return re.sub(r"^(whole number|number|value)", r"\1s", words)


def _parts_within(value: Schema, path: str) -> Iterator[tuple[str, str]]:
    """Return the path and the name of each part that a value consists of."""
    if "$ref" in value:
        yield path, value["$ref"].rpartition("/")[2]
    for option in (*value.get("anyOf", []), *value.get("oneOf", [])):
        yield from _parts_within(option, path)
    if isinstance(value.get("additionalProperties"), dict):
        of_each = value["additionalProperties"]
        yield from _parts_within(of_each.get("anyOf", [of_each])[0], f"{path}.KEY")
    if "items" in value:
        yield from _parts_within(value["items"], f"{path}[]")


def _in_a_line(text: str) -> str:
    return " ".join(text.split())


def _anchor(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
