from __future__ import annotations

import subprocess
import sys
from random import Random
from typing import Any

import pytest
from conftest import digits_values
from pydantic import ValidationError

from lorvp.config import DatasetConfig, TrialConfig
from lorvp.data.datasets import LOADERS
from lorvp.mappings.base import make_mapping
from lorvp.methods.base import Method
from lorvp.parts import ROOMS, kinds
from lorvp.prompts.base import make_prompt
from lorvp.utils import plugins
from lorvp.utils.explain import explain, located
from sweeps.spec.model import set_dotted


def test_learning_rates_default_to_lr(digits):
    values = {"backbone": {"name": "resnet18"}, "dataset": {"name": "digits"}, "optimizer": {"lr": 0.3}}
    config = TrialConfig.model_validate(values)
    assert (config.prompt.lr, config.head.lr) == (0.3, 0.3)
    assert digits(prompt={"lr": 1}, optimizer={"lr": 0.3}).prompt.lr == 1.0


def test_equal_configs_are_one_trial(digits):
    config = digits()
    values = digits_values()
    shuffled = {key: values[key] for key in reversed(values)}
    shuffled["prompt"] = {"lr": "5e-2", "optimizer": "adam", "rank": 2, "kind": "low_rank"}
    shuffled |= {"head": {"kind": "lp"}, "method": "lorvp", "optimizer": {"name": "sgd", "lr": 1e-1}}
    assert TrialConfig.model_validate(shuffled).content_hash() == config.content_hash()
    again = TrialConfig.model_validate_json(config.model_dump_json())
    assert again == config
    assert again.canonical_json() == config.canonical_json()


@pytest.mark.parametrize("kind", ["rlm", "flm", "ilm"])
def test_a_trial_from_before_a_key_keeps_its_hash(digits, kind):
    """One source class for a class is what there was before `head.sources_per_class`."""
    config = digits(head={"kind": kind})
    assert config.values()["head.sources_per_class"] == 1
    assert "sources_per_class" not in config.canonical_json()
    assert config.content_hash() == digits(head={"kind": kind, "sources_per_class": 1}).content_hash()
    assert config.content_hash() != digits(head={"kind": kind, "sources_per_class": 2}).content_hash()


def test_hash_is_the_same_in_another_process(digits):
    code = "import sys, lorvp; print(lorvp.TrialConfig.model_validate_json(sys.argv[1]).content_hash())"
    command = [sys.executable, "-c", code, digits().model_dump_json()]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == digits().content_hash()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"dataset": {"name": "digits", "val_from": 9}},
            "val_from is a position: train_images and val_images must say",
        ),
        (
            {"dataset": {"name": "digits", "val_from": 9, "train_images": 4, "val_images": 4, "max_per_class": 3}},
            "val_from counts all images: leave max_classes and max_per_class out",
        ),
        (
            {"dataset": {"name": "digits", "train_on_val": True}, "rungs": [{"epochs": 1, "train_share": 0.5}]},
            "dataset.train_on_val trains on all images, train_share on a part",
        ),
    ],
)
def test_which_images_is_said_once(digits, changes, said):
    with pytest.raises(ValidationError, match=said):
        digits(**changes)


FITTED = {"method": "linear_probe", "epochs": 1, "head": {"init": "fitted"}}
VAL_FROM = {"name": "digits", "train_images": 4, "val_images": 4, "val_from": 9}


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"prompt": {"kind": "border", "rank": 2}}, "prompt.rank"),
        ({"method": "vpt", "prompt": {"lr": 0.1}}, "prompt.lr"),
        ({"prompt": {"optimizer": "adam", "momentum": 0.9}}, "prompt.momentum"),
        ({"prompt": {"init_a": "xavier", "init_std": 1}}, "prompt.init_std"),
        ({"adapter": {"count": 3}}, "adapter.count"),
        ({"head": {"kind": "flm", "lr": 2}}, "head.lr"),
        ({"head": {"fit": "best"}}, "head.fit"),
        ({"head": {"kind": "flm", "counting": "pass"}}, "head.counting"),
        ({"optimizer": {"lr": 1}, "head": {"kind": "flm"}, "prompt": {"lr": 1}}, "optimizer.lr"),
        ({"optimizer": {"name": "adam", "momentum": 0.5}}, "optimizer.momentum"),
        ({"method": "galore", "head": {"kind": "flm"}, "optimizer": {"name": "adam"}}, "optimizer.name"),
        (FITTED | {"optimizer": {"lr": 1}}, "optimizer.lr"),
        (FITTED | {"head": {"init": "fitted", "lr": 1}}, "head.lr"),
        (FITTED | {"batch_size": 2}, "batch_size"),
        (FITTED | {"init_seed": 2}, "init_seed"),
        (FITTED | {"schedule": {"name": "constant"}}, "schedule.name"),
        (FITTED | {"dataset": {"name": "digits", "trivial_augment": True}}, "dataset.trivial_augment"),
        (FITTED | {"dataset": {"name": "digits", "color_jitter": 0.4}}, "dataset.color_jitter"),
        ({"schedule": {"milestones": [0.5]}}, "schedule.milestones"),
        ({"method": "fine_tuning", "speed": {"fold_batchnorm": False}}, "speed.fold_batchnorm"),
        ({"backbone": {"name": "resnet18", "zero_shot": "texts"}}, "backbone.zero_shot"),
        ({"method": "acavp", "prompt": {"rank": 2}}, "prompt.rank"),
        ({"method": "acavp", "prompt": {"additive": "low_rank", "affine": False, "scale": 0.5}}, "prompt.scale"),
        ({"method": "acavp", "prompt": {"color": False, "max_gain": 2}}, "prompt.max_gain"),
        ({"dataset": {"name": "digits", "val_images": 9, "val_fraction": 0.1}}, "dataset.val_fraction"),
        ({"dataset": {"name": "digits", "root": "data"}}, "dataset.root"),
        ({"dataset": VAL_FROM | {"split_seed": 1}}, "dataset.split_seed"),
    ],
)
def test_a_key_without_effect_cannot_be_written(values, key):
    with pytest.raises(ValidationError) as raised:
        TrialConfig.model_validate({"backbone": {"name": "resnet18"}, "dataset": {"name": "digits"}} | values)
    error = raised.value.errors()[0]
    assert (error["type"], ".".join(map(str, located(error, TrialConfig)))) == ("no_effect", key)
    assert "leave it out" in explain(raised.value, TrialConfig)[1]


VALUES: dict[str, list[Any]] = {
    "method": ["lorvp", "vpt", "lorvp+vpt", "autovp+vqt", "galore", "lorvp+lp_ft", "linear_probe", "border"],
    "prompt.kind": ["none", "low_rank", "border", "frame", "acavp"],
    "prompt.rank": [1, 2],
    "prompt.pad": [3, 4],
    "prompt.inner": [128, 200],
    "prompt.affine": [True, False],
    "prompt.color": [True, False],
    "prompt.additive": ["padding", "low_rank"],
    "prompt.scale": [0.5, 0.9],
    "prompt.max_gain": [3.0, 4.0],
    "prompt.init": ["zero", "normal"],
    "prompt.init_a": ["normal", "xavier"],
    "prompt.init_std": [0.1, 0.2],
    "prompt.lr": [0.1, 0.2],
    "prompt.optimizer": ["sgd", "adam"],
    "prompt.momentum": [0.5, 0.9],
    "adapter.kind": ["none", "vpt", "fine_tuning", "galore"],
    "adapter.count": [1, 2],
    "adapter.rank": [8, 16],
    "adapter.lr": [0.1, 0.2],
    "adapter.momentum": [0.5, 0.9],
    "head.kind": ["lp", "fm", "flm", "ilm"],
    "head.init": ["random", "fitted"],
    "head.fit": ["best", 0.1],
    "head.lr": [0.1, 0.2],
    "head.counting": ["pass", "streamed"],
    "head.sources_per_class": [1, 5],
    "optimizer.name": ["sgd", "adam"],
    "optimizer.lr": [0.3, 0.4],
    "optimizer.momentum": [0.6, 0.7],
    "schedule.name": ["steps", "cosine"],
    "schedule.milestones": [[0.5], [0.75]],
    "epochs": [1, 3],
    "batch_size": [8, 16],
    "init_seed": [0, 1],
    "speed.fold_batchnorm": [True, False],
    "dataset.val_fraction": [0.2, 0.3],
    "dataset.val_images": [20, 30],
}


def drawn(random: Random) -> dict[str, Any]:
    """Values of some keys, by dotted path."""
    return {key: random.choice(VALUES[key]) for key in random.sample(list(VALUES), random.randint(1, 9))}


def validated(flat: dict[str, Any]) -> TrialConfig | None:
    values: dict[str, Any] = {"backbone": {"name": "resnet18"}, "dataset": {"name": "digits"}}
    for key, value in flat.items():
        set_dotted(values, key, value)
    try:
        return TrialConfig.model_validate(values)
    except ValidationError:
        return None


def test_nothing_that_a_valid_config_says_is_ignored():
    """Two valid configs that differ in one key differ in their hash, but where a default or a preset says the same."""
    random = Random(0)
    configs = [(flat, config) for flat in (drawn(random) for _ in range(16_000)) if (config := validated(flat))]
    assert len(configs) > 150
    assert {key for flat, _ in configs for key in flat} == VALUES.keys()
    for flat, config in configs:
        read = config.values()
        for key, value in flat.items():
            if key.startswith("optimizer."):
                option = key.removeprefix("optimizer.").replace("name", "optimizer")
                taken = [f"{part}.{option}" for part in ("prompt", "adapter", "head") if f"{part}.{option}" not in flat]
                assert any(read.get(name) == value for name in taken), (flat, key)
            else:
                assert read[key] == value, (flat, key)
        again = TrialConfig.model_validate(config.model_dump())
        assert (again, again.content_hash()) == (config, config.content_hash())


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"epoch": 3}, "epoch"),
        ({"prompt": {"kind": "fourier"}}, "low_rank"),
        ({"prompt": {"rank": 0}}, "greater"),
        ({"head": {"kind": "lpp"}}, "lpp.*'flm', 'fm', 'ilm', 'lp'"),
        ({"optimizer": {"lr": float("nan")}}, "finite"),
        ({"dataset": {"name": "store"}}, "root"),
        ({"schedule": {"warmup_epochs": 3}}, "below epochs"),
        ({"method": "linear_probe", "head": {"kind": "flm"}}, "lp or fm"),
        ({"method": "acavp", "prompt": {"affine": False}}, "prompt.affine must be true, or prompt.additive low_rank"),
        (
            {"method": "acavp", "prompt": {"affine": False, "color": False, "additive": "low_rank"}},
            "prompt.kind must be low_rank",
        ),
        ({"method": "acavp", "prompt": {"scale": 1.0}}, r"prompt.scale \(1\) must be below prompt.max_scale \(1\)"),
    ],
)
def test_what_cannot_work_is_refused(digits, changes, word):
    with pytest.raises(ValidationError, match=word):
        digits(**changes)


def test_config_is_frozen(digits):
    with pytest.raises(ValidationError):
        digits().epochs = 4


def test_names_in_the_config_are_those_that_exist():
    for name, kind in kinds("head").items():
        mapping = make_mapping(kind(kind=name), 20, 8, 5)
        assert bool(list(mapping.parameters())) == kind.learns
        assert (mapping.update == "epoch") == (name == "ilm")
    assert set(DatasetConfig.model_fields["name"].annotation.__args__) == set(LOADERS)
    for name in set(plugins.names("lorvp.prompts")) - {"none"}:
        assert make_prompt(kinds("prompt")[name](kind=name), 32).pattern().shape == (3, 32, 32)
    for name in plugins.names("lorvp.adapters"):
        assert issubclass(plugins.load(f"lorvp.adapters.{name}.adapter"), Method)
    for part, package in ROOMS.items():
        assert [kind.model_fields["kind"].default for kind in kinds(part).values()] == list(plugins.names(package))


@pytest.mark.slow
def test_configs_and_drivers_need_no_torch():
    modules = (
        "lorvp.config, cluster.job_manager, cluster.local, sweeps.spec, sweeps.search.controller, sweeps.run.driver"
    )
    code = f"import sys; import {modules}, sweeps.results.leaderboard, sweeps.launch; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_jobs_need_neither_ray_nor_mlflow():
    code = "import sys; import cluster.job, lorvp.training.loop; sys.exit(bool({'ray', 'mlflow'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
