"""`recommended: true` in a space: the range that this version recommends for the key."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.samples.specs import load

from lorvp.errors import UserError
from sweeps.spec.recommended import RANGES

SPEC = """
name: recommended
trial:
  backbone: {name: lorvp_tiny_32.cifar10}
  dataset: {name: digits}
  prompt: {optimizer: adam}
  head: {kind: lp}
  epochs: 3
search: {trials: 4}
space:
  head.init: {recommended: true}
  head.fit: {recommended: true}
  prompt.rank: {recommended: true}
  prompt.lr: {recommended: true}
  head.lr: {recommended: true, when: {head.init: random}}
"""


def test_each_key_gets_its_range_and_keeps_its_condition(tmp_path: Path):
    space = load(tmp_path, SPEC).space
    assert space["prompt.lr"].log_uniform == tuple(RANGES["prompt.lr"]["log_uniform"])
    assert space["prompt.rank"].choice == RANGES["prompt.rank"]["choice"]
    assert space["head.lr"].when == {"head.init": ["random"]}
    assert space["head.fit"].when == {"head.init": ["fitted"]}
    fixed = SPEC.replace("  head.init: {recommended: true}\n", "").replace("{kind: lp}", "{kind: lp, init: fitted}")
    fixed = fixed.replace(", when: {head.init: random}", "")
    assert load(tmp_path, fixed).space["head.fit"].when == {}


def test_a_sweep_that_goes_on_keeps_its_ranges(tmp_path: Path, monkeypatch):
    spec = load(tmp_path, SPEC)
    kept = spec.model_dump(mode="json", by_alias=True)
    monkeypatch.setitem(RANGES, "prompt.lr", {"log_uniform": [1.0, 2.0]})
    assert type(spec).model_validate(kept) == spec
    assert load(tmp_path, SPEC).space["prompt.lr"].log_uniform == (1.0, 2.0)


def test_a_range_of_one_optimizer_beside_that_of_another(tmp_path: Path):
    both = SPEC.replace(
        "  prompt.lr: {recommended: true}\n",
        "  prompt.optimizer: {choice: [adam, sgd]}\n"
        "  prompt.lr:\n"
        "    - {recommended: true, when: {prompt.optimizer: adam}}\n"
        "    - {log_uniform: [0.1, 1], when: {prompt.optimizer: sgd}}\n",
    )
    ranges = load(tmp_path, both).space["prompt.lr"].ranges
    assert ranges is not None
    assert [axis.log_uniform for axis in ranges] == [tuple(RANGES["prompt.lr"]["log_uniform"]), (0.1, 1)]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("optimizer: adam", "optimizer: sgd", ":14: space.prompt.lr: its recommended range is for prompt.opt"),
        ("  prompt: {optimizer: adam}\n", "", ":13: space.prompt.lr: its recommended range is for prompt.opt"),
        ("{kind: lp}", "{kind: lp, optimizer: adam}", "space.head.lr: its recommended range is for head.opt"),
        ("prompt.lr: {", "batch_size: {", ":14: space.batch_size: has no recommended range; prompt.lr, "),
        ("prompt: {optimizer: adam}", "prompt: {optimizr: adam}", "trial.prompt.optimizr: no such key"),
        ("prompt.lr: {", "prompt.rl: {", "space.prompt.rl: no such key of a trial; did you mean prompt.lr"),
        ("prompt.lr: {", "prompt.lr: {int: [1, 2], ", ":14: space.prompt.lr: recommended stands in place of int"),
        ("prompt.lr: {recommended: true", "prompt.lr: {recommended: no", "space.prompt.lr.recommended: "),
        ("prompt.lr: {", "prompt.lr: {when: , ", ":14: space.prompt.lr.when: "),
        ("prompt.lr: {", "prompt.lr: {when: 5, ", ":14: space.prompt.lr.when: "),
        ("prompt.lr: {", "prompt.lr: {when: [adam], ", ":14: space.prompt.lr.when: "),
    ],
)  # fmt: skip
def test_what_has_no_recommended_range_is_refused(old: str, new: str, message: str, tmp_path: Path):
    with pytest.raises(UserError) as raised:
        load(tmp_path, SPEC.replace(old, new, 1))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
