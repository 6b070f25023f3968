from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from support.samples.specs import GOOD
from typer.testing import CliRunner

from lorvp import presets
from lorvp.config import EARLIER, TrialConfig
from lorvp.errors import UserError
from sweeps import launch
from sweeps.results import rows
from sweeps.search.cell_sampler import CellSampler
from sweeps.search.suggest import suggest
from sweeps.spec import choices
from sweeps.spec import file as spec_file

SWEEPS = Path(launch.__file__).parent


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a spec, `GOOD` with one piece replaced, in an empty working folder."""
    monkeypatch.chdir(tmp_path)

    def make(old: str = "", new: str = "") -> Path:
        assert old in GOOD
        path = tmp_path / "sweep.yaml"
        path.write_text(GOOD.replace(old, new, 1) if old else GOOD)
        return path

    return make


BROKEN = {
    "unknown key": ("early_stopping", "early_stoping", ":12: early_stoping: no such key; did you mean early_stopping?"),
    "no name": ("name: good\n", "", ": name: this key is missing"),
    "name with a slash": ("name: good", "name: a/b", ":1: name: 'a/b' names the sweep's folder"),
    "wrong type": ("epochs: 4", "epochs: four", ":5: trial.epochs: Input should be a valid integer"),
    "unknown key in trial": ("epochs: 4", "epoch: 4", ":5: trial.epoch: no such key; did you mean epochs?"),
    "unknown key deep in trial": ("{name: digits}", "{nam: digits}", "trial.dataset.nam: no such key; did you mean name?"),
    "missing part of trial": ("  dataset: {name: digits}\n", "", ":2: trial.dataset: this key is missing"),
    "empty choice": ("choice: [1e-3, 0.1]", "choice: []", ":9: space.prompt.lr.choice: List should have at least 1"),
    "value that the key can't take": ("[flm, fm, lp]", "[flm, fm, lp, lpp]", ":7: space.head.kind.choice[3]: unknown name 'lpp'; did you mean lp?"),
    "negative rank": ("int: [1, 3]", "int: [0, 3]", ":8: space.prompt.rank: Input should be greater than 0, not 0"),
    "axis of an unknown key": ("prompt.rank", "prompt.rnk", ":8: space.prompt.rnk: no such key of a trial; did you mean prompt.rank?"),
    "axis within a list": ("prompt.rank", "rungs.epochs", ":8: space.rungs.epochs: no such key of a trial"),
    "axis without values": ("{int: [1, 3]}", "{}", ":8: space.prompt.rank: needs exactly one of choice"),
    "axis with two kinds": ("{int: [1, 3]}", "{int: [1, 3], choice: [1]}", "it has choice and int"),
    "axis of an unknown kind": ("{int: [1, 3]}", "{between: [1, 3]}", ":8: space.prompt.rank.between: no such key; one of choice"),
    "axis of a misspelt kind": ("{int: [1, 3]}", "{range: [1, 3]}", ":8: space.prompt.rank.range: no such key; did you mean ranges?"),
    "axis that is a number": ("{int: [1, 3]}", "3", ":8: space.prompt.rank: Input should be a valid dictionary"),
    "bounds the wrong way round": ("int: [1, 3]", "int: [3, 1]", "the low end 3 must be below the high end 1"),
    "log of zero": ("{choice: [1e-3, 0.1]}", "{log_uniform: [0, 0.1]}", ":9: space.prompt.lr: log_uniform needs a low end above 0"),
    "value twice": ("[flm, fm, lp]", "[flm, fm, flm]", "choice names a value twice"),
    "list in a choice": ("[flm, fm, lp]", "[flm, [fm, lp]]", ":7: space.head.kind.choice[1]: must be a single"),
    "condition on a missing axis": ("when: {head.kind:", "when: {head.knd:", ":10: space.head.lr.when.head.knd: no such axis in space: head.knd; did you mean head.kind?"),
    "condition that can't be met": ("when: {head.kind: [fm, lp]}", "when: {head.kind: [ilm]}", ":10: space.head.lr.when.head.kind: 'ilm' is not a value"),
    "conditions in a circle": ("{choice: [flm, fm, lp]}", "{choice: [flm, fm, lp], when: {head.lr: 0.1}}", ":6: space: conditions in a circle: head.kind, head.lr"),
    "grid over a range": ("{choice: [1e-3, 0.1]}", "{uniform: [0.1, 0.2]}", ":9: space.prompt.lr: a grid takes choice and int axes only"),
    "cmaes with categories": ("algorithm: grid", "algorithm: cmaes, trials: 4", ":7: space.head.kind: cmaes can't take categories"),
    "search without trials": ("algorithm: grid", "algorithm: tpe", ":11: search: tpe needs trials"),
    "unknown algorithm": ("algorithm: grid", "algorithm: grdi", ":11: search.algorithm: unknown name 'grdi'; did you mean grid?"),
    "wrong number of cells": ("algorithm: grid", "algorithm: grid, trials: 7", ":11: search.trials: this grid has 30 cells"),
    "grace longer than a trial": ("grace_epochs: 2", "grace_epochs: 9", ":12: early_stopping.grace_epochs: must be at most epochs, which is 4"),
    "unknown objective": ("name: good", "name: good\nobjective: val_acc", ":2: objective: Input should be 'val_top1'"),
    "unknown control key": ("name: good", "name: good\ncontrol: {methd: linear_probe}", ":2: control.methd: no such key of a trial; did you mean method?"),
    "head fitted how far": ("  epochs: 4", "  epochs: 4\n  head: {init: fitted, fit: far}", ":6: trial.head.fit: must be C above 0, or best, or a share of the best val accuracy, as 90%; not 'far'"),
    "head fitted to no C": ("  epochs: 4", "  epochs: 4\n  head: {init: fitted, fit: 0}", ":6: trial.head.fit: must be C above 0"),
    "head fitted to no share": ("  epochs: 4", "  epochs: 4\n  head: {init: fitted, fit: 120%}", ":6: trial.head.fit: must be C above 0"),
    "control that can't be": ("name: good", "name: good\ncontrol: {optimizer.lr: [0.1, -1]}", ":2: control.optimizer.lr: Input should be greater than 0"),
    "unknown cluster": ("name: good", "name: good\ncluster: mars", ":2: cluster: no such profile 'mars'; one of local, rtx8000, "),
    "two axes that don't go together": ("  prompt.rank: {int: [1, 3]}", "  method: {choice: [lorvp, linear_probe]}", ":8: space.method.choice[1]: nothing is trained: head.kind must be lp or fm where there is no prompt and no adapter, not flm"),
    "confirmed with one seed": ("name: good", "name: good\nconfirm: {seeds: [3]}", ":2: confirm.seeds: List should have at least 2 items"),
    "confirmed with a seed twice": ("name: good", "name: good\nconfirm: {seeds: [3, 4, 3]}", ":2: confirm: seeds names a seed twice"),
    "confirmed with the search's seed": ("name: good", "name: good\nconfirm: {seeds: [3, 0]}", ":2: confirm.seeds: the search trains under seed 0 (init_seed, order_seed) and has chosen by it; others confirm, as [1, 2]"),
    "confirmed with a seed of the trial": ("  epochs: 4\n", "  epochs: 4\n  order_seed: 5\nconfirm: {seeds: [4, 5, 6]}\n", ":7: confirm.seeds: the search trains under seed 5 (init_seed, order_seed) and has chosen by it; others confirm, as [6, 7, 8]"),
    "confirmed with a seed of the space": ("space:\n", "confirm: {seeds: [1, 3]}\nspace:\n  init_seed: {int: [1, 5, 2]}\n", ":6: confirm.seeds: the search trains under seed 1 (init_seed, order_seed)"),
    "confirmed with a seed of the control": ("name: good", "name: good\ncontrol: {init_seed: [7, 8]}\nconfirm: {seeds: [8, 9]}", ":3: confirm.seeds: the search trains under seed 8 (init_seed, order_seed)"),
    "confirmed none": ("name: good", "name: good\nconfirm: {top: 0}", ":2: confirm.top: Input should be greater than 0, not 0"),
    "confirm without a mapping": ("name: good", "name: good\nconfirm: true", ":2: confirm: Input should be a valid dictionary"),
    "test set and confirm": ("  epochs: 4\n", "  epochs: 4\n  read_test: true\nconfirm: {}\n", ":6: trial.read_test: leave it out beside confirm"),
    "test set of the control and confirm": ("name: good", "name: good\ncontrol: {read_test: true}\nconfirm: {}", ":2: control.read_test: leave it out beside confirm"),
    "selection searched and confirm": ("space:\n", "confirm: {}\nspace:\n  select: {choice: [val, test_best_epoch]}\n", ":8: space.select: leave it out beside confirm"),
    "equal shares of a grid": ("algorithm: grid", "algorithm: grid, equal: head.kind", ":11: search.equal: a grid has every cell anyway"),
    "equal shares of no axis": ("algorithm: grid", "algorithm: tpe, trials: 6, equal: head.knd", ":11: search.equal: no such axis in space: head.knd; did you mean head.kind?"),
    "equal shares of a range": ("algorithm: grid", "algorithm: tpe, trials: 6, equal: prompt.rank", ":11: search.equal: prompt.rank must be a choice axis"),
    "equal shares under a condition": ("algorithm: grid", "algorithm: tpe, trials: 6, equal: head.lr", ":11: search.equal: head.lr exists under a condition only"),
    "fewer trials than equal shares": ("algorithm: grid", "algorithm: tpe, trials: 2, equal: head.kind", ":11: search.trials: must be at least 3, one for each value of head.kind"),
    "seconds without equal shares": ("algorithm: grid", "algorithm: tpe, trials: 6, seconds: 60", ":11: search.seconds: a limit for each value of an axis: needs search.equal"),
    "no seconds": ("algorithm: grid", "algorithm: tpe, trials: 6, equal: head.kind, seconds: 0", ":11: search.seconds: Input should be greater than 0"),
    "equal shares spelt otherwise": (GOOD[GOOD.index("  head.kind") : GOOD.index("early")], "  backbone.checkpoint: {choice: [a.safetensors, b.safetensors]}\nsearch: {algorithm: tpe, trials: 6, equal: backbone.checkpoint}\n", ":7: space.backbone.checkpoint.choice[0]: search.equal needs it as a trial has it: '/"),
    "no space": (GOOD[GOOD.index("space:") : GOOD.index("search:")], "space: {}\n", "space: needs at least one axis"),
    "not YAML": ("{name: digits}", "{name: digits", "not valid YAML"),
    "a tab": ("  epochs: 4", "\tepochs: 4", ":5: not valid YAML"),
    "a key twice": ("  epochs: 4", "  epochs: 4\n  epochs: 5", ":6: not valid YAML"),
    "a tag on a list": ("[flm, fm, lp]", "!!python/object/apply:os.system [ls]", ":7: not valid YAML: no value here has the tag !!python/object/apply:os.system; leave it out"),
    "a tag on a mapping": ("{name: digits}", "!foo {name: digits}", ":4: not valid YAML: no value here has the tag !foo; leave it out"),
    "a tag on a word": ("name: good", "name: !!binary Z29vZA==", ":1: not valid YAML: no value here has the tag !!binary; leave it out"),
    "a tag that does not fit": ("epochs: 4", "epochs: !!int four", ":5: not valid YAML: 'four' can't be read as int"),
    "a number of thousands of digits": ("epochs: 4", f"epochs: {'9' * 5000}", ":5: not valid YAML: '99999999999999999999' can't be read as int"),
    "an anchor that holds itself": ("{name: digits}", "&data {name: digits, root: *data}", ":4: not valid YAML: an anchor that holds itself"),
    "anchors that stand for billions": ("name: good", "a: &a [" + "1, " * 99 + "]\nb: &b [" + "*a, " * 99 + "]\nc: [" + "*b, " * 99 + "]", "not valid YAML: more than 100000 values"),
    "a merge of no mapping": ("epochs: 4", "<<: [1, 2]", ":5: not valid YAML: a merge key takes a mapping"),
    "a list as a key": ("  epochs: 4", "  ? [epochs]\n  : 4", ":5: not valid YAML: a key must be a word"),
    "too deep": ("epochs: 4", "epochs: " + "[" * 2000, ": not valid YAML: lists or mappings in one another, too many deep"),
    "a grid of billions": ("int: [1, 3]", "int: [1, 3_000_000_000]", ":8: space.prompt.rank: an axis of a grid may have 100000 values"),
    "a grid of too many": ("[1e-3, 0.1]}", "[1e-3, 0.1]}\n  epochs: {int: [2, 9000]}\n  order_seed: {int: [1, 20]}", ":6: space: a grid may have 100000 cells"),
    "nobody's home": ("{name: digits}", "{name: image_folder, root: ~nobody-here/images}", ":4: trial.dataset.root: '~nobody-here/images': there is no such home folder"),
    "a word in place of a part": ("  backbone: {name: lorvp_tiny_32.cifar10}", "  backbone: tiny", ":3: trial.backbone: "),
    "a word in place of a part that has an axis": ("  epochs: 4", "  epochs: 4\n  prompt: border", ":6: trial.prompt: must be a mapping of its keys, not 'border'"),
    "a list": (GOOD, "- a\n- b\n", ":1: must be a mapping"),
    "empty": (GOOD, "# nothing\n", ":1: must be a mapping of keys, and is empty"),
}  # fmt: skip


def refused(arguments: list[str], folder: Path) -> str:
    """The one line that launching says, with exit code 2 and nothing written."""
    before = sorted(folder.rglob("*"))
    result = CliRunner().invoke(launch.app, arguments)
    assert result.exit_code == 2, result.output
    assert result.output.count("\n") == 1, result.output
    assert sorted(folder.rglob("*")) == before
    return result.output


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_spec(kind, write, tmp_path):
    old, new, message = BROKEN[kind]
    path = write(old, new)
    said = refused([str(path)], tmp_path)
    assert message in said
    assert str(path) in said


EARLIER_FORM = {
    "under trial": ("  epochs: 4", "  epochs: 4\n  label_mapping: lp", ":6: trial.label_mapping: label_mapping is of an earlier form: write head.kind"),
    "axis": ("  head.kind:", "  label_mapping:", ":7: space.label_mapping: label_mapping is of an earlier form: write head.kind"),
    "axis of a part": ("  prompt.lr:", "  optimizer.prompt_lr:", ":9: space.optimizer.prompt_lr: optimizer.prompt_lr is of an earlier form: write prompt.lr"),
    "axis of a part that is renamed": ("  prompt.lr:", "  tokens.count:", ":9: space.tokens.count: tokens is of an earlier form: write adapter, with the same keys"),
    "part that is renamed": ("  epochs: 4", "  epochs: 4\n  tokens: {count: 5}", ":6: trial.tokens: tokens is of an earlier form: write adapter, with the same keys"),
    "key within a part": ("  epochs: 4", "  epochs: 4\n  optimizer: {lr: 0.1, prompt_lr: 0.2}", ":6: trial.optimizer.prompt_lr: optimizer.prompt_lr is of an earlier form: write prompt.lr"),
    "part within a part": ("  epochs: 4", "  epochs: 4\n  optimizer:\n    galore: {rank: 8}", ":7: trial.optimizer.galore: optimizer.galore is of an earlier form: write adapter, with the same keys"),
    "control": ("name: good", "name: good\ncontrol: {head_init: linear_probe}", ":2: control.head_init: head_init is of an earlier form: write head.init, where linear_probe is now fitted"),
    "beside an unknown key": ("  epochs: 4", "  epoch: 4\n  label_mapping: lp", ":6: trial.label_mapping: label_mapping is of an earlier form: write head.kind"),
}  # fmt: skip


@pytest.mark.parametrize("kind", EARLIER_FORM)
def test_a_spec_of_the_earlier_form_says_what_to_write(kind, write, tmp_path):
    old, new, message = EARLIER_FORM[kind]
    text = GOOD.replace("head.kind: [fm, lp]", "label_mapping: [fm, lp]") if kind == "axis" else GOOD
    path = write(GOOD, text.replace(old, new, 1))
    assert refused([str(path)], tmp_path) == f"error: {path}{message}\n"


@pytest.mark.parametrize("key", EARLIER)
def test_each_key_of_the_earlier_form_says_what_to_write(key, write, tmp_path):
    path = write()
    said = f"{key}: {key} is of an earlier form: write {EARLIER[key]}\n"
    assert refused([str(path), "--set", f"trial.{key}=1"], tmp_path) == f"error: {path}:2: trial.{said}"
    axis = f"space.{key}={{choice: [1, 2]}}"
    assert refused([str(path), "--set", axis], tmp_path) == f"error: {path}:6: space.{said}"
    assert refused([str(path), "--set", f"control.{key}=1"], tmp_path) == f"error: {path}: control.{said}"


UNUSED = {
    "another prompt's": ("  prompt: {pad: 10}", "prompt.pad", "it belongs to kind border, not low_rank: leave it out"),
    "another head's": ("  head: {counting: streamed}", "head.counting", "it belongs to kind ilm, not lp: leave it out"),
    "an adapter's": ("  adapter: {count: 5}", "adapter.count", "it belongs to kind vpt or vqt, not none: leave it out"),
    "momentum beside adam": ("  prompt: {optimizer: adam, momentum: 0.8}", "prompt.momentum", "only sgd has a momentum: leave it out"),
    "what all parts have of their own": ("  optimizer: {lr: 0.1}", "optimizer.lr", "every part that is trained has its own: leave it out"),
    "the first of two": ("  optimizer: {name: adam, lr: 0.1, momentum: 0.8}", "optimizer.lr", "every part that is trained has its own: leave it out"),
    "another schedule's": ("  schedule: {milestones: [0.5]}", "schedule.milestones", "only the schedule steps has them: leave it out"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNUSED)
def test_a_fixed_value_without_use_is_refused(kind, write, tmp_path):
    line, key, reason = UNUSED[kind]
    path = write("  epochs: 4", f"  epochs: 4\n{line}")
    said = f"error: {path}:6: trial.{key}: no trial of this sweep has a use for it: {reason}\n"
    assert refused([str(path)], tmp_path) == said


@pytest.mark.parametrize(
    ("key", "value", "axis", "kinds"),
    [
        ("prompt.pad", 7, "prompt.kind", ["low_rank", "border"]),
        ("head.counting", "streamed", "head.kind", ["flm", "ilm"]),
        ("head.init", "fitted", "head.kind", ["flm", "fm", "lp"]),
        ("adapter.count", 3, "adapter.kind", ["none", "vpt"]),
        ("prompt.momentum", 0.5, "prompt.optimizer", ["adam", "sgd"]),
        ("schedule.milestones", [0.25], "schedule.name", ["cosine", "steps"]),
    ],
)
def test_a_fixed_value_is_left_out_where_it_has_no_effect(write, key, value, axis, kinds):
    path = write("  head.lr: {choice: [0.1, 1], when: {head.kind: [fm, lp]}}\nsearch: {algorithm: grid}", "search: {}")
    overrides = ["search={algorithm: random, trials: 3}", "trial.backbone.name=lorvp_tiny_vit_32.cifar10"]
    spec = spec_file.load(path, [*overrides, f"trial.{key}={value}", f"space.{axis}={{choice: [{', '.join(kinds)}]}}"])
    first, *others = (spec.trial_config(spec.example({axis: kind})) for kind in kinds)
    assert key not in first.values()
    assert [config.values()[key] for config in others] == [value] * len(others)


def test_a_shared_value_is_left_out_where_the_parts_have_their_own(write):
    """Each head has a learning rate of its own under a condition that one of them does not meet."""
    spec = spec_file.load(write("when: {head.kind: [fm, lp]}", "when: {head.kind: fm}"), ["trial.optimizer.lr=0.3"])
    lrs = {(config.head.kind, config.head.lr) for config in map(spec.trial_config, spec.cells()) if config.head.learns}
    assert lrs == {("fm", 0.1), ("fm", 1.0), ("lp", 0.3)}
    assert {spec.trial_config(cell).prompt.lr for cell in spec.cells()} == {0.001, 0.1}


RANKED = "low_rank, none, scaled_frame"
WRONG_KIND = {
    "another prompt than the preset's": ("  method: ilm_vp\n  prompt: {kind: border}", ":7: trial.prompt.kind: method ilm_vp has prompt.kind frame, not border: leave one of them out"),
    "a prompt beside an adapter's preset": ("  method: vpt\n  prompt: {kind: low_rank}", ":7: trial.prompt.kind: method vpt has prompt.kind none, not low_rank: leave one of them out"),
    "another adapter than the preset's": ("  method: lorvp+vpt\n  adapter: {kind: vqt}", ":7: trial.adapter.kind: method lorvp+vpt has adapter.kind vpt, not vqt: leave one of them out"),
    "another head than the preset's": ("  method: lorvp+lp_ft\n  head: {init: random}", ":7: trial.head.init: method lorvp+lp_ft has head.init fitted, not random: leave one of them out"),
    "no such preset": ("  method: vtp", ":6: trial.method: unknown name 'vtp'; one of acavp, autovp, border, evp, fine_tuning, full_image, galore, ilm_vp, linear_probe, lorvp, lp_ft, vpt, vqt"),
    "presets the wrong way round": ("  method: vpt+lorvp", ":6: trial.method: method vpt+lorvp: what goes together is a prompt and an adapter: lorvp+fine_tuning, lorvp+galore, lorvp+vpt, lorvp+vqt, lorvp+lp_ft"),
    "no such prompt": ("  prompt: {kind: x}", f":6: trial.prompt.kind: unknown name 'x'; one of acavp, border, evp, frame, full_image, {RANKED}"),
    "a misspelt prompt": ("  prompt: {kind: bordr}", ":6: trial.prompt.kind: unknown name 'bordr'; did you mean border?"),
    "no such adapter": ("  adapter: {kind: x}", ":6: trial.adapter.kind: unknown name 'x'; one of fine_tuning, galore, none, vpt, vqt"),
    "no such head": ("control: {head.kind: x}", ":6: control.head.kind: unknown name 'x'; one of flm, fm, ilm, lp, rlm"),
    "an unknown key of a kind": ("  adapter: {kind: vpt, cuont: 3}", ":6: trial.adapter.cuont: no such key; did you mean count?"),
    "a wrong value of a kind": ("  adapter: {kind: vpt, count: 0}", ":6: trial.adapter.count: Input should be greater than or equal to 1, not 0"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG_KIND)
def test_a_wrong_kind_is_refused_by_its_key(kind, write, tmp_path):
    """The key is that of the YAML file: the name of a kind, by which pydantic finds its options, is no part of it."""
    lines, message = WRONG_KIND[kind]
    path = write("  epochs: 4", f"  epochs: 4\n{lines}")
    assert refused([str(path)], tmp_path) == f"error: {path}{message}\n"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["space.prompt.kind={choice: [low_rank, x]}"], f"space.prompt.kind.choice[1]: unknown name 'x'; one of acavp, border, evp, frame, full_image, {RANKED}"),
        (["space.adapter.kind={choice: [x, vpt]}"], "space.adapter.kind: unknown name 'x'; one of fine_tuning, galore, none, vpt, vqt"),
        (["space.method={choice: [lorvp, x]}"], "space.method.choice[1]: unknown name 'x'; one of acavp, autovp, border, evp, fine_tuning, full_image, galore, "),
        (["space.method={choice: [lorvp, border]}", "trial.prompt.kind=low_rank"], "trial.prompt.kind: method border has prompt.kind border, not low_rank: leave one of them out"),
        (["space.prompt.kind={choice: [low_rank, border]}", "trial.method=lorvp"], "space.prompt.kind.choice[1]: method lorvp has prompt.kind low_rank, not border: leave one of them out"),
    ],
)  # fmt: skip
def test_an_axis_of_wrong_kinds_is_refused(overrides, message, write, tmp_path):
    path = write()
    said = refused([str(path), *itertools.chain(*(("--set", override) for override in overrides))], tmp_path)
    assert re.fullmatch(rf"error: {re.escape(str(path))}:\d+: {re.escape(message)}.*\n", said), said


def test_files_that_are_no_specs(tmp_path):
    assert "no such file" in refused([str(tmp_path / "none.yaml")], tmp_path)
    assert "a folder" in refused([str(tmp_path)], tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    assert "can't be read" in refused([str(tmp_path / "binary.yaml")], tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.trials", "must be KEY=VALUE"),
        ("search.trails=3", "search.trails: no such key; did you mean trials?"),
        ("trial.epochs=[", "not a YAML value"),
        ("trial.dataset={name: store}", "dataset store needs root"),
        ("trial.dataset={name: image_folder, root: nowhere}", "trial.dataset.root: no such folder"),
        ("trial.backbone.checkpoint=gone.safetensors", "trial.backbone.checkpoint: no such file"),
        ("output=/proc/nothing", "can't be written"),
        ("tracking.uri=nowhere://x", "MLflow at nowhere://x can't be used"),
        ("tracking.uri=http://127.0.0.1:9", "MLflow at http://127.0.0.1:9 can't be used"),
    ],
)
def test_broken_overrides(override, message, write, tmp_path):
    assert message in refused([str(write()), "--set", override], tmp_path)


def test_resuming_what_is_not_there(write, tmp_path):
    assert "no such sweep" in refused([str(write()), "--resume"], tmp_path)


def test_overrides_reach_every_kind_of_key(write):
    overrides = [
        "search.algorithm=random",
        "search.trials=3",
        "trial.prompt.init_std=1e-3",
        "space.prompt.rank.int=[2, 6]",
        "space.prompt.lr={log_uniform: [1e-3, 1e-1]}",
        "space.prompt.init_a={choice: [normal, uniform]}",
        "control.method=linear_probe",
        "control.optimizer.lr=[0.1, 1]",
    ]
    changed = spec_file.load(write(), [*overrides, "control.head.kind=lp"])
    assert changed.search.trials == 3
    assert changed.space["prompt.rank"].integers == [2, 6]
    assert changed.space["prompt.lr"].log_uniform == (1e-3, 1e-1)
    assert changed.space["prompt.lr"].choice is None
    assert list(changed.space)[-1] == "prompt.init_a"
    assert changed.trial["prompt"] == {"init_std": 1e-3}
    fitted, *_ = changed.control_configs()
    assert (fitted.method, fitted.head.init, fitted.head.fit, fitted.epochs) == (
        "linear_probe",
        "fitted",
        "best",
        1,
    )
    assert [config.head.lr for config in changed.control_configs()[-2:]] == [0.1, 1.0]


def test_every_head_of_the_space_has_a_control_fitted_to_the_end(write):
    def controls(*overrides: str, old: str = "", new: str = "") -> list[str]:
        return [config.head.kind for config in spec_file.load(write(old, new), overrides).control_configs()]

    assert controls() == ["fm", "lp"]
    assert controls("trial.schedule={warmup_epochs: 1}", "space.head.lr.when={head.kind: fm}") == ["fm", "lp"]
    assert controls("control=null") == []
    head = "  head.lr: {choice: [0.1, 1], when: {head.kind: [fm, lp]}}\n"
    assert controls(old=GOOD, new=GOOD.replace("[flm, fm, lp]}", "[flm, ilm]}").replace(head, "")) == ["lp"]


def test_a_control_may_have_other_rungs(write):
    rungs = "[[], [{epochs: 1, image_size: 16}]]"
    spec = spec_file.load(write(), ["trial.rungs=[{epochs: 2, image_size: 24}]", f"control.rungs={rungs}"])
    *_, whole, small = spec.control_configs()
    assert (whole.rungs, [rung.epochs for rung in small.rungs]) == ((), [1])


def test_an_axis_is_pinned_in_the_space_alone(write):
    pins = "--set 'space.prompt.rank={choice: [2]}' pins it"
    with pytest.raises(
        UserError, match=re.escape("--set trial.prompt.rank=2: prompt.rank is an axis, and the search")
    ) as refused:
        spec_file.load(write(), ["trial.prompt.rank=2"])
    assert str(refused.value).endswith(pins)
    assert spec_file.load(write(), ["space.prompt.rank={choice: [2]}"]).space["prompt.rank"].choice == [2]
    under_a_condition = spec_file.load(write(), ["trial.head.lr=0.5"])  # of trials without the axis
    assert under_a_condition.trial["head"] == {"lr": 0.5}


@pytest.mark.parametrize(
    ("axis", "overrides"),
    [
        ("prompt.pad: {choice: [10, 20]}", []),
        ("adapter.count: {choice: [1, 5]}", []),
        ("optimizer.momentum: {choice: [0.8, 0.9]}", ["trial.optimizer={name: adam}"]),
        ("head.lr: {choice: [0.1, 1], when: {head.kind: flm}}", []),
    ],
)
def test_an_axis_without_use_is_refused(write, axis, overrides):
    head = "  head.lr: {choice: [0.1, 1], when: {head.kind: [fm, lp]}}\n"
    with pytest.raises(
        UserError, match=f"space.{axis.partition(':')[0]}: no trial of this sweep has a use for it; leave it out"
    ):
        spec_file.load(write(head, f"  {axis}\n"), overrides)


def test_an_axis_that_one_value_of_another_uses(write):
    kinds = "space.prompt.kind={choice: [low_rank, full_image, border]}"
    assert "prompt.pad" in spec_file.load(write(), [kinds, "space.prompt.pad={choice: [10, 20]}"]).space


def test_augmentation_is_an_axis_and_its_control_has_none(write):
    axes = ["space.dataset.trivial_augment={choice: [false, true]}", "space.dataset.color_jitter={choice: [null, 0.4]}"]
    spec, plain = spec_file.load(write(), axes), spec_file.load(write())
    assert len(spec.cells()) == 4 * len(plain.cells())
    configs = [spec.trial_config(cell) for cell in spec.cells()]
    assert len({config.content_hash() for config in configs}) == len(configs)
    assert [spec.params(config) for config in configs] == spec.cells()
    fixed = spec_file.load(write(), ["trial.dataset.trivial_augment=true", "trial.dataset.color_jitter=0.2"])
    controls = plain.control_configs()
    for each in (spec, fixed):
        assert each.control_configs() == controls
        assert not any("dataset.trivial_augment" in each.params(control) for control in controls)
    assert all(config.dataset.augments for config in [fixed.trial_config(cell) for cell in fixed.cells()])
    by_steps = spec_file.load(write(), [axes[0], "control.optimizer.lr=0.1", "control.dataset.trivial_augment=true"])
    assert [config.dataset.trivial_augment for config in by_steps.control_configs()] == [
        *(False for _ in controls),
        True,
    ]


def test_only_the_confirmation_reads_the_test_set(write):
    overrides = ["confirm={seeds: [5, 6]}", "control.optimizer.lr=0.1", "trial.select=test_best_epoch"]
    spec = spec_file.load(write(), [*overrides, "trial.dataset.split_seed=3"])
    searched = [spec.trial_config(cell) for cell in spec.cells()] + spec.control_configs()
    assert {(config.read_test, config.select, spec.stage(config)) for config in searched} == {(False, "val", "search")}
    again = spec.confirmed(searched[0], 6)
    assert (again.read_test, again.select, again.init_seed, again.order_seed) == (True, "test_best_epoch", 6, 6)
    assert spec.stage(again) == "confirm"
    assert again.dataset.split_seed == 3
    assert again.content_hash() not in {config.content_hash() for config in searched}
    fitted = spec.control_configs()[0]
    assert spec.confirmed(fitted, 5).content_hash() == spec.confirmed(fitted, 6).content_hash()
    without = spec_file.load(write())
    assert {without.stage(config) for config in [without.trial_config(without.example()), again]} == {"search"}


@pytest.mark.parametrize("overrides", [[], ["trial.select=test_best_epoch"], ["trial.read_test=false"]])
def test_a_confirmation_that_is_added_later_leaves_the_search_as_it_is(write, overrides):
    overrides = [*overrides, "control.optimizer.lr=0.1"]
    before, later = (spec_file.load(write(), [*overrides, *more]) for more in ([], ["confirm.added_later=true"]))
    searched = [later.trial_config(cell) for cell in later.cells()] + later.control_configs()
    assert searched == [before.trial_config(cell) for cell in before.cells()] + before.control_configs()
    assert {later.stage(config) for config in searched} == {"search"}
    assert len(later.seeds) == 5
    for seed in later.seeds:
        again = later.confirmed(searched[0], seed)
        assert (again.read_test, again.order_seed, later.stage(again)) == (True, seed, "confirm")
        assert again.select == searched[0].select
    if "trial.read_test=false" not in overrides:  # a fitted control has no use for a seed: it is there already
        assert later.confirmed(later.control_configs()[0], later.seeds[0]) == later.control_configs()[0]
    everything = spec_file.load(write(), [*overrides, "confirm={added_later: true, all_images: true}"])
    assert everything.stage(everything.confirmed(everything.control_configs()[0], 1)) == "confirm"


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["confirm.added_later=true"], None),
        (["confirm={added_later: true, top: 2, seeds: [7, 8]}"], None),
        (["confirm.top=1"], "confirm: this sweep was started without it; --set confirm.added_later=true confirms it"),
        (["confirm.added_later=true", "trial.epochs=9"], "trial.epochs is not what this sweep was started with"),
    ],
)
def test_a_sweep_may_be_confirmed_when_it_is_resumed(write, overrides, problem):
    before, now = (spec_file.load(write(), more).model_dump(mode="json", by_alias=True) for more in ([], overrides))
    spec = spec_file.load(write(), overrides)
    if problem is None:
        launch.check_same_sweep(spec, before, now)
        with pytest.raises(UserError, match="confirm is not what this sweep was started with"):
            launch.check_same_sweep(spec, now, before)
    else:
        with pytest.raises(UserError, match=problem):
            launch.check_same_sweep(spec, before, now)


def test_only_the_confirmation_trains_on_the_validation_images(write):
    spec = spec_file.load(write(), ["confirm.all_images=true"])
    found = spec.trial_config(spec.cells()[0])
    again = spec.confirmed(found, 1)
    assert (found.dataset.train_on_val, again.dataset.train_on_val) == (False, True)
    assert found.values().keys() == again.values().keys()
    differ = {key for key, value in again.values().items() if found.values()[key] != value}
    assert differ == {"dataset.train_on_val", "read_test", "init_seed", "order_seed"}
    for key in (
        "trial.dataset.train_on_val=true",
        "space.dataset.train_on_val={choice: [true, false]}",
        "control.dataset.train_on_val=true",
    ):
        with pytest.raises(
            UserError, match=r"dataset.train_on_val: the search chooses by the validation images: confirm.all_images"
        ):
            spec_file.load(write(), ["confirm={}", key])
    rungs = "trial.rungs=[{epochs: 1, train_share: 0.5}]"
    with pytest.raises(
        UserError, match=r"confirm.all_images: a rung trains on a part of the images: leave its train_share out"
    ):
        spec_file.load(write(), ["confirm.all_images=true", rungs])


@pytest.mark.parametrize(
    ("overrides", "seeds"),
    [
        ([], []),
        (["confirm={}"], [1, 2, 3, 4, 5]),
        (["confirm={seeds: [4, 9]}"], [4, 9]),
        (["confirm={}", "trial.init_seed=5"], [6, 7, 8, 9, 10]),
        (["confirm={}", "trial.init_seed=3", "trial.order_seed=3"], [4, 5, 6, 7, 8]),
        (["confirm={seeds: [0, 1]}", "trial.init_seed=3", "trial.order_seed=3"], [0, 1]),
        (["confirm={}", "space.init_seed={choice: [2, 11]}"], [12, 13, 14, 15, 16]),
        (["confirm={seeds: [3, 4]}", "space.init_seed={choice: [2, 11]}"], [3, 4]),
        (
            ["confirm={}", "space.order_seed={int: [0, 1000000000]}", "search={algorithm: tpe, trials: 5}"],
            [10**9 + i for i in (1, 2, 3, 4, 5)],
        ),
        (["confirm={seeds: [2, 4]}", "space.init_seed={int: [1, 5, 2]}"], [2, 4]),
        (["confirm={}", "control.init_seed=[0, 4]", "control.method=linear_probe"], [5, 6, 7, 8, 9]),
    ],
)
def test_seeds_that_confirm_have_not_chosen(write, overrides, seeds):
    spec = spec_file.load(write(), overrides)
    assert spec.seeds == seeds
    for config in [spec.trial_config(spec.example()), *spec.control_configs()]:
        if config.trains_by_steps:
            assert not {config.init_seed, config.order_seed} & set(spec.seeds)
        else:  # a seed has no effect on it
            assert (config.init_seed, config.order_seed) == (0, 0)


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        (["confirm={}"], 5 + 1),  # the control is fitted
        (["confirm={top: 2}", "control.head.init=random", "control.method=linear_probe"], 2 * 5 + 5),
        (["confirm={top: 2}", "control=null", "search={algorithm: tpe, trials: 5, equal: head.kind}"], 5 * 5),
        (["confirm={top: 99, seeds: [1, 2]}", "control=null"], 30 * 2),
        ([], 0),
    ],
)
def test_how_many_trials_confirm(write, overrides, count):
    path = write()
    arguments = [argument for override in overrides for argument in ("--set", override)]
    spec = spec_file.load(path, overrides)
    assert spec.number_of_confirmations() == count
    result = CliRunner().invoke(launch.app, [str(path), "--dry-run", "--no-estimate", *arguments])
    assert (f"confirmation: up to {count} trials more" in result.output) == (count > 0)


def test_milestones_are_where_decisions_fall(write):
    overrides = ["trial.epochs=20", "early_stopping.grace_epochs=2", "trial.rungs=[{epochs: 3, image_size: 16}]"]
    assert choices.milestones(spec_file.load(write(), overrides)) == [2, 3, 4, 8, 16]
    assert choices.milestones(spec_file.load(write(), ["early_stopping.rule=none"])) == []


def test_where_a_trial_lies_in_the_space(write):
    """With an axis that is the default of other keys, without one that has no effect on the trial."""
    spec = spec_file.load(write("prompt.lr", "optimizer.lr"))
    point = {"head.kind": "fm", "prompt.rank": 2, "optimizer.lr": 0.1, "head.lr": 1}
    assert spec.params(spec.trial_config(point)) == point
    del point["head.lr"]
    assert spec.params(spec.trial_config(point | {"head.kind": "flm"})) == point | {"head.kind": "flm"}
    (control, _) = spec.control_configs()
    assert "prompt.rank" not in spec.params(control)


METHODS = [
    *presets.names(),
    *(f"lorvp+{adapter}" for adapter in ("vpt", "vqt", "fine_tuning", "galore", "lp_ft")),
    "border+vpt",
    "ilm_vp+vqt",
    "autovp+galore",
    "full_image+lp_ft",
]
EVERY_METHOD = f"""\
name: methods
trial:
  backbone: {{name: lorvp_tiny_vit_32.cifar10}}
  dataset: {{name: digits}}
  epochs: 4
space:
  method: {{choice: [{", ".join(METHODS)}]}}
  prompt.rank: {{choice: [1, 4]}}
  adapter.count: {{choice: [1, 5]}}
  optimizer.lr: {{log_uniform: [0.01, 1]}}
search: {{algorithm: tpe, trials: {2 * len(METHODS)}, equal: method}}
confirm: {{}}
"""


def test_each_preset_has_an_equal_share(tmp_path):
    """A trial belongs to the arm of the preset that it was made by, also where it is confirmed."""
    (tmp_path / "sweep.yaml").write_text(EVERY_METHOD)
    spec = spec_file.load(tmp_path / "sweep.yaml")
    assert list(spec.arms()) == METHODS
    for method, arm in spec.arms().items():
        assert (arm.number_of_trials(), arm.space["method"].choice) == (2, [method])
        config = arm.trial_config(arm.example())
        assert (config.method, spec.params(config)["method"], spec.arm(config)) == (method, method, method)
        assert spec.arm(spec.confirmed(config, 1)) == method
        again = TrialConfig.model_validate(config.model_dump(mode="json"))  # without the preset
        assert (again.content_hash(), spec.arm(again)) == (config.content_hash(), method)
        assert spec.trial_config(spec.params(config)) == config
        assert ("prompt.rank" in spec.params(config)) == (config.prompt.kind == "low_rank")
        assert ("adapter.count" in spec.params(config)) == (config.adapter.kind in ("vpt", "vqt"))
    assert len({arm.trial_config(arm.example()).content_hash() for arm in spec.arms().values()}) == len(METHODS)


def test_a_preset_that_a_trial_has_by_another_name_has_no_share(tmp_path):
    (tmp_path / "sweep.yaml").write_text(EVERY_METHOD)
    with pytest.raises(UserError, match=r"search\.equal needs it as a trial has it: 'lp_ft', not 'fine_tuning'"):
        spec_file.load(
            tmp_path / "sweep.yaml", ["space.method={choice: [lorvp, fine_tuning]}", "trial.head.init=fitted"]
        )


def test_short_names(write):
    """The last word of an axis, of a kind that of its part; both words where another axis has the same last one."""
    spec = spec_file.load(write(), ["space.prompt.kind={choice: [low_rank, border]}"])
    assert spec.short_names() == {
        "head.kind": "head",
        "prompt.rank": "rank",
        "prompt.lr": "prompt.lr",
        "head.lr": "head.lr",
        "prompt.kind": "prompt",
    }
    assert spec_file.load(write("  prompt.lr: {choice: [1e-3, 0.1]}\n", "")).short_names()["head.lr"] == "lr"


def test_grid_has_every_valid_cell_once(write):
    good = spec_file.load(write())
    cells = good.cells()
    expected = [
        {"head.kind": m, "prompt.rank": r, "prompt.lr": p} | ({"head.lr": h} if h else {})
        for m, r, p in itertools.product(["flm", "fm", "lp"], [1, 2, 3], [0.001, 0.1])
        for h in ([None] if m == "flm" else [0.1, 1])
    ]
    assert len(cells) == good.number_of_trials() == 30
    assert sorted(map(str, cells)) == sorted(
        map(str, ({k: e[k] for k in good.ordered_axes() if k in e} for e in expected))
    )
    assert len({good.trial_config(cell).content_hash() for cell in cells}) == 30


def test_grid_sampler_follows_the_conditions(write):
    good = spec_file.load(write())
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=CellSampler(good.cells()))
    suggested = [suggest(good, study.ask()) for _ in good.cells()]
    assert suggested == good.cells()


@pytest.mark.parametrize("algorithm", ["random", "tpe", pytest.param("gp", marks=pytest.mark.slow)])
def test_samplers_are_seeded_and_follow_the_conditions(write, algorithm):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    overrides = [f"search.algorithm={algorithm}", "search.trials=12", "search.seed=4"]
    sweep = spec_file.load(write("{choice: [1e-3, 0.1]}", "{log_uniform: [1e-3, 0.1]}"), overrides)

    def run(seed: int) -> list[dict]:
        study = optuna.create_study(
            sampler=choices.algorithm(sweep.search).make_sampler(sweep, seed), direction="maximize"
        )
        points = []
        for _ in range(12):
            trial = study.ask()
            points.append(suggest(sweep, trial))
            study.tell(trial, points[-1]["prompt.lr"])
        return points

    points = run(4)
    assert points == run(4) != run(5)
    for point in points:
        assert ("head.lr" in point) == (point["head.kind"] != "flm")
        assert isinstance(sweep.trial_config(point), TrialConfig)


def test_cmaes_takes_numbers(write):
    overrides = ["search={algorithm: cmaes, trials: 8}", "trial.head.kind=lp"]
    path = write(
        GOOD[GOOD.index("  head.kind") : GOOD.index("search:")],
        "  prompt.lr: {log_uniform: [1e-3, 1]}\n  prompt.rank: {int: [1, 8]}\n",
    )
    sweep = spec_file.load(path, overrides)
    study = optuna.create_study(sampler=choices.algorithm(sweep.search).make_sampler(sweep, 0))
    for _ in range(8):
        trial = study.ask()
        study.tell(trial, suggest(sweep, trial)["prompt.rank"])


FAST = ("quickstart", "lorvp_cifar10")
SHIPPED = [
    pytest.param(path, id=path.stem, marks=() if path.stem in FAST else pytest.mark.slow)
    for path in sorted({*SWEEPS.glob("*.yaml")} - {rows.PUBLISHED_PATH})
]


@pytest.mark.parametrize("path", SHIPPED)
def test_sweeps_that_come_with_the_project(path, monkeypatch):
    monkeypatch.setattr(launch, "memory_line", lambda *_: "")  # which builds the models; test_memory.py is about it
    loaded = spec_file.load(path)
    assert loaded.name == path.stem
    assert path.read_text().startswith("#")
    result = CliRunner().invoke(launch.app, [str(path), "--dry-run", "--no-estimate"])
    assert result.exit_code == 0
    assert "estimate" not in result.output
    assert f"trials: {loaded.number_of_trials()}" in result.output


def test_published_settings():
    imagenet = spec_file.load(SWEEPS / "lorvp_imagenet.yaml")
    config = imagenet.trial_config({})
    assert (config.backbone.name, config.epochs, config.batch_size) == ("vit_base_patch16_224_miil.in21k", 30, 256)
    assert {"head.lr", "prompt.lr", "prompt.rank", "head.kind"} < set(imagenet.space)
    for name in ("lorvp_imagenet", "lorvp_tiny_imagenet", "lorvp_cifar10"):
        spec = spec_file.load(SWEEPS / f"{name}.yaml")
        first = spec.trial_config(spec.search.try_first[0])
        assert (first.prompt.optimizer, first.prompt.lr, first.head.lr, first.rank) == ("sgd", 0.02, 0.02, 4), name
    cifar = spec_file.load(SWEEPS / "lorvp_cifar100.yaml")
    row = cifar.trial_config({})
    assert (row.head.lr, row.prompt.rank, row.head.kind, row.epochs, row.batch_size) == (
        0.02,
        4,
        "lp",
        20,
        256,
    )
    published = {
        "head.kind": "lp",
        "prompt.rank": 4,
        "head.lr": 0.02,
        "prompt.optimizer": "sgd",
        "prompt.lr": 0.02,
    }
    assert published in cifar.cells()


def test_the_peers_published_grids():
    """As their public code has them; what differs is in each spec's header."""
    vpt, vqt, autovp, ilm_vp = (
        spec_file.load(SWEEPS / f"{name}.yaml")
        for name in ("vpt_cifar100", "vqt_cifar100", "autovp_cifar10", "ilmvp_cifar10")
    )
    assert (vpt.number_of_trials(), vqt.number_of_trials(), autovp.number_of_trials()) == (480, 60, 126)
    for spec in (vpt, vqt):
        config = spec.trial_config(spec.cells()[0])
        assert (config.scale_lr, config.batch_size, config.adapter.dropout) == (True, 128, 0.1)
        assert (config.epochs, config.schedule.warmup_epochs, spec.early_stopping.rule) == (100, 10, "none")
        assert (config.dataset.train_images, config.dataset.val_images, config.dataset.val_from) == (800, 200, 45_000)
        assert (config.backbone.name, config.backbone.mean) == (
            "vit_base_patch16_224.orig_in21k",
            (0.485, 0.456, 0.406),
        )
        assert spec.confirm is not None
        assert (spec.confirm.seeds, spec.confirm.all_images) == ([42, 44, 82, 100, 800], True)
    dropouts = {(c.adapter.deep, c.adapter.dropout) for c in map(vpt.trial_config, vpt.cells())}
    assert dropouts == {(True, 0.1), (False, 0.0)}
    for spec, schedule, grace in ((autovp, "constant", 3), (ilm_vp, "steps", None)):
        config = spec.trial_config(spec.cells()[0])
        assert (config.batch_size, config.schedule.name) == (128, schedule)
        assert spec.early_stopping.grace_epochs == grace


def test_values_that_go_with_some_others_only(write):
    """A grid over them is refused (above); a search is not, and such a point is a failed trial."""
    path = write("  prompt.rank: {int: [1, 3]}", "  method: {choice: [lorvp, linear_probe]}")
    assert spec_file.load(path, ["search={algorithm: random, trials: 3}"]).number_of_trials() == 3


def test_dry_run_writes_nothing(write, tmp_path):
    path = write()
    few = ["--set", "trial.dataset.max_per_class=40", "--set", "trial.batch_size=8"]
    result = CliRunner().invoke(launch.app, [str(path), "--dry-run", *few])
    assert result.exit_code == 0
    assert "trials: 30" in result.output
    assert '"lr": 0.001' in result.output
    assert re.search(r"estimate: \S+ GPU-hours; .* by 20 steps on this machine's [CG]PU", result.output)
    assert sorted(tmp_path.rglob("*")) == [path]


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("trial.dataset={name: image_folder, root: nowhere}", "trial.dataset.root: no such folder"),
        ("trial.backbone.checkpoint=gone.safetensors", "trial.backbone.checkpoint: no such file"),
    ],
)
def test_dry_run_without_an_estimate(override, reason, write, tmp_path):
    path = write()
    result = CliRunner().invoke(launch.app, [str(path), "--dry-run", "--set", override])
    assert result.exit_code == 0
    assert f"no estimate: {reason}" in result.output
    assert sorted(tmp_path.rglob("*")) == [path]


def test_errors_are_user_errors(write):
    with pytest.raises(UserError):
        spec_file.load(write("epochs: 4", "epochs: 0"))


def test_a_shell_completes_what_can_be_set():
    script = Path(sys.executable).parent / "lorvp-sweep"
    asked = {"_LORVP_SWEEP_COMPLETE": "complete_bash", "COMP_WORDS": "lorvp-sweep --set search.s", "COMP_CWORD": "2"}
    found = subprocess.run([script], env=os.environ | asked, capture_output=True, text=True)
    assert found.stdout.split() == ["search.seed=", "search.seconds="]
    assert spec_file.settable_keys("trial.rungs") == ["trial.rungs="]
    assert spec_file.settable_keys("space.ch") == []
    assert spec_file.settable_keys("control.head.i") == ["control.head.init="]


def test_anchors_and_merge_keys_are_read(write):
    spec = spec_file.load(write("  epochs: 4", "  <<: [&long {epochs: 9}, {batch_size: 8}]\n  <<: *long"))
    assert (spec.trial["epochs"], spec.trial["batch_size"]) == (9, 8)


def test_an_arm_that_another_axis_renames_is_refused(write):
    """Fine-tuning from a fitted head is lp_ft, so that no arm would have those trials."""
    space = "  method: {choice: [lorvp, fine_tuning]}\n  head.init: {choice: [random, fitted]}\n"
    text = GOOD[GOOD.index("  head.kind") : GOOD.index("search:")]
    search = "search={algorithm: tpe, trials: 6, equal: method}"
    with pytest.raises(UserError, match=r"space.method.choice\[1\]: .* 'lp_ft', not 'fine_tuning' beside head.init fi"):
        spec_file.load(write(text, space), [search, "trial.head={kind: lp}"])
    apart = space.replace("fitted]}", "fitted], when: {method: lorvp}}")
    assert list(spec_file.load(write(text, apart), [search, "trial.head={kind: lp}"]).arms()) == [
        "lorvp",
        "fine_tuning",
    ]


def test_a_control_has_no_key_without_effect(write):
    with pytest.raises(UserError, match=r"control.prompt.pad: no control has a use for it: it belongs to kind border"):
        spec_file.load(write(), ["control.prompt.pad=10"])
    spec = spec_file.load(write(), ["control.prompt.pad=10", "control.prompt.kind=[low_rank, border]"])
    assert [config.values().get("prompt.pad") for config in spec.control_configs()[-2:]] == [None, 10]


def test_a_shared_rate_is_not_a_parts_too(write):
    """Under one condition the adapter has an axis of its own, under another it takes the shared one."""
    space = """\
  method: {choice: [vpt, fine_tuning]}
  adapter.lr: {log_uniform: [0.01, 1], when: {method: vpt}}
  optimizer.lr: {log_uniform: [0.0003, 0.03], when: {method: fine_tuning}}
  head.lr: {choice: [0.1]}
"""
    overrides = ["trial.backbone.name=lorvp_tiny_vit_32.cifar10", "search={algorithm: tpe, trials: 6}"]
    text = GOOD[GOOD.index("  head.kind") : GOOD.index("search:")]
    spec = spec_file.load(write(text, space), [*overrides, "trial.head={kind: lp}"])
    for point in (
        {"method": "vpt", "adapter.lr": 0.5, "head.lr": 0.1},
        {"method": "fine_tuning", "optimizer.lr": 0.001, "head.lr": 0.1},
    ):
        assert spec.params(spec.trial_config(point)) == point
