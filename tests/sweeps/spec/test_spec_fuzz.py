"""Specs by the thousand that somebody spoilt: each is a `Spec`, or refused in one line."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.samples.specs import GOOD

from lorvp.errors import UserError
from lorvp.utils.yaml_file import YamlFile
from sweeps import launch
from sweeps.spec import file as spec_file
from sweeps.spec.model import Spec

SWEEPS = sorted(path for path in Path(launch.__file__).parent.glob("*.yaml") if path.name != "published.yaml")
RANGES = """\
name: ranges
trial:
  backbone: {name: lorvp_tiny_32.cifar10}
  dataset: {name: digits}
  epochs: 4
space:
  prompt.optimizer: {choice: [adam, sgd]}
  prompt.lr:
    - {log_uniform: [0.003, 0.03], when: {prompt.optimizer: adam}}
    - {log_uniform: [0.05, 0.5], when: {prompt.optimizer: [sgd]}}
  head.refit: {choice: [true, false]}
search: {algorithm: tpe, trials: 8, try_first: [{prompt.lr: 0.1, prompt.optimizer: sgd}]}
early_stopping: {rule: asha, grace_epochs: 2, within: [prompt.optimizer]}
"""
TEXTS = [GOOD] * 8 + [RANGES] * 4 + [path.read_text() for path in SWEEPS]
"""Mostly the short one: of the long ones, a mutation hits a comment as often as not."""
MUTATIONS = 5000

PIECES = [
    *("!!python/object/apply:os.system [ls]", "!!python/name:os.system ''", "!foo ", "!!binary aGk=", "!!set {a, b}"),
    *("!!int x", "!!float x", "!!bool x", "!!omap [a: 1]", "!!null x", "!!str 5", "!<tag:a> b"),
    *("&a ", "*a", "&a [*a]", "<<: *a", "<<: [1]", "<<: {epochs: 3}", "? [a, b]\n: 1\n", "? "),
    *("9" * 5000, "-0", "1e999", "-.inf", ".nan", "0x", "0o8", "1_0", "1e-400", "2001-99-99", "12:30:45", "-1", "0.5"),
    *(
        "[" * 500,
        "{" * 500,
        "[",
        "]",
        "{",
        "}",
        ":",
        ": ",
        ",",
        "- ",
        "#",
        "'",
        '"',
        "|",
        ">",
        "|2\n",
        "%",
        "@",
        "`",
        "~",
    ),
    *(
        "null",
        "true",
        "yes",
        "on",
        "''",
        "\t",
        "\n",
        "\r",
        "---\n",
        "...\n",
        "%YAML 1.1\n",
        "\x00",
        "\x85",
        "\ufeff",
        "é",
        "😀",
    ),
    *(
        "{kind: vpt}",
        "kind: border\n",
        "method: vpt\n",
        "label_mapping: lp\n",
        "tokens: {count: 5}",
        "prompt.kind",
        "lp_ft",
    ),
    *("{choice: []}", "{int: [1, 2, 0]}", "{when: {}}", "../..", "/dev/null", "~nobody/x", "${HOME}", "a" * 5000),
]
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        10**30,
        -(10**30),
        0.0,
        -0.0,
        1e-320,
        1e308,
        float("inf"),
        float("nan"),
        "",
        " ",
        "\n",
    ),
    *(
        "a",
        "é",
        "\x00",
        "a\nb",
        "../..",
        "/",
        "~",
        "~nobody",
        "%s{}",
        "auto",
        "val",
        "9" * 400,
        [],
        {},
        [[]],
        [None],
        {"": 1},
    ),
    *("border", "vpt", "lorvp+lp_ft", "galore", "none", {"kind": "vqt"}, {"kind": "x"}, {"kind": []}, {"prompt_lr": 1}),
    *(
        {"a": {"b": []}},
        [1, "a", None],
        [1, 2, 0],
        [3, 1],
        {"choice": [1, True, 1.0]},
        {"int": [1, 10**20]},
        ["a"] * 300,
    ),
    *(
        [{"uniform": [0, 1], "when": {"head.kind": "fm"}}, {"uniform": [2, 3], "when": {"head.kind": "lp"}}],
        {"ranges": [{"choice": [1], "when": {"a": 1}}, {"uniform": [2, 3]}]},
        [{"prompt.lr": 0.01}, {"prompt.lr": "x"}],
        {"uniform": [0, 1], "when": {"head.kind": "fm"}},
        {"log_uniform": [1e-300, 1e300]},
        {"x.y": 1},
        {"<<": {"a": 1}},
    ),
]


def spoilt_text(text: str, dice: random.Random) -> str:
    for _ in range(dice.choice((1, 1, 2, 4))):
        at, end = sorted(dice.choices(range(len(text) + 1), k=2))
        match dice.randrange(6):
            case 0:
                text = text[:at] + dice.choice(PIECES) + text[at:]
            case 1:
                text = text[:at] + text[min(end, at + dice.randrange(1, 12)) :]
            case 2:  # a value
                found = list(re.finditer(r"(?<=[:,\[{] )[^\s,\]}]+|(?<=\[)[^\s,\]}]+", text))
                if found:
                    start, end = dice.choice(found).span()
                    text = text[:start] + dice.choice((dice.choice(PIECES), str(dice.choice(VALUES)))) + text[end:]
            case 3:  # two lines change places, or all after the first of them are lost
                lines = text.splitlines(keepends=True) or [""]
                i, j = dice.randrange(len(lines)), dice.randrange(len(lines))
                lines[i], lines[j] = lines[j], lines[i]
                text = "".join(lines[: i + 1] if dice.random() < 0.2 else lines)
            case 4:  # a line again, or one less, or further in
                lines = text.splitlines(keepends=True) or [""]
                i = dice.randrange(len(lines))
                lines[i : i + 1] = dice.choice(([lines[i]] * 2, [], [" " * dice.randrange(1, 4) + lines[i]]))
                text = "".join(lines)
            case 5:
                text = text.replace(*dice.choice(((": ", ":"), ("  ", "\t"), ("{", ""), ("\n", "\r\n"), (",", ";"))), 1)
    return text


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Each mapping or list with one of its keys or indices."""
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        yield node, key
        if isinstance(value, dict | list):
            yield from places(value)


def spoilt_tree(text: str, dice: random.Random) -> str:
    tree = json.loads(text)
    for _ in range(dice.choice((1, 1, 2, 3))):
        found = list(places(tree))
        if not found:
            break
        node, key = dice.choice(found)
        match dice.randrange(5):
            case 0 | 1:
                node[key] = json.loads(json.dumps(dice.choice(VALUES)))
            case 2:
                del node[key]
            case 3:
                other, another = dice.choice(found)
                if another in other if isinstance(other, dict) else another < len(other):
                    node[key] = json.loads(json.dumps(other[another]))
            case 4 if isinstance(node, dict):
                others = (
                    "choice",
                    "when",
                    "",
                    ".",
                    "a.b",
                    "kind",
                    "method",
                    "adapter",
                    "optimizer",
                    "head.init",
                    "tokens",
                )
                name = dice.choice((key[:-1], f"{key}.{key}", key.upper(), dice.choice(others)))
                node[name] = node.pop(key)
            case _:
                node[key] = [node[key]]
    return json.dumps(tree)


def trees(tmp_path: Path) -> list[str]:
    found = []
    for text in TEXTS:
        (tmp_path / "whole.yaml").write_text(text)
        found.append(json.dumps(YamlFile(tmp_path / "whole.yaml").values))
    return found


@pytest.mark.slow
def test_a_spoilt_spec_is_read_or_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)  # a driver has none, and is told its models by a file
    dice, whole, read = random.Random(17), trees(tmp_path), 0
    for number in range(MUTATIONS):
        text = spoilt_text(dice.choice(TEXTS), dice) if number % 2 else spoilt_tree(dice.choice(whole), dice)
        Path("spoilt.yaml").write_text(text, newline="")
        try:
            read += isinstance(spec_file.load(Path("spoilt.yaml")), Spec)
        except UserError as error:
            if len(str(error).splitlines()) != 1:
                pytest.fail(f"mutation {number}: {str(error)!r}\n{text[:3000]}")
        except BaseException as error:
            pytest.fail(f"mutation {number}: {type(error).__name__}: {error}\n{text[:3000]}")
    assert 0.1 < read / MUTATIONS < 0.9  # neither all spoilt too much nor too little
