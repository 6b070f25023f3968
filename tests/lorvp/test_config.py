from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import digits_values
from pydantic import ValidationError

from lorvp import mappings
from lorvp.config import HEAD_MAPPINGS, DatasetConfig, TrialConfig
from lorvp.data.datasets import LOADERS
from lorvp.utils import plugins


def test_learning_rates_default_to_lr(digits):
    optimizer = digits(optimizer={"lr": 0.3}).optimizer
    assert (prompt.lr, head.lr) == (0.3, 0.3)
    assert digits(prompt={"lr": 1}, optimizer={"lr": 0.3}).prompt.lr == 1.0


def test_equal_configs_are_one_trial(digits):
    config = digits()
    values = digits_values()
    shuffled = {key: values[key] for key in reversed(values)}
    shuffled["optimizer"] = {"prompt_lr": "5e-2", "prompt_name": "adam", "head_lr": 0.1, "lr": 1e-1}
    assert TrialConfig.model_validate(shuffled).content_hash() == config.content_hash()
    again = TrialConfig.model_validate_json(config.model_dump_json())
    assert again == config
    assert again.canonical_json() == config.canonical_json()


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


def test_what_has_no_effect_does_not_make_another_trial(digits):
    flm = {"head": {"kind": "flm"}}
    assert (
        digits(**flm, prompt={"lr": 0.1}, optimizer={"lr": 1}).content_hash()
        == digits(**flm, prompt={"lr": 0.1}, head={"lr": 2}).content_hash()
    )
    probe = {"method": "linear_probe"}
    assert digits(**probe, prompt={"rank": 1}).content_hash() == digits(**probe, prompt={"rank": 8}).content_hash()
    assert digits(prompt={"rank": 1}).content_hash() != digits(prompt={"rank": 8}).content_hash()
    assert digits(init_seed=1).content_hash() != digits().content_hash()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"epoch": 3}, "epoch"),
        ({"prompt": {"kind": "fourier"}}, "low_rank"),
        ({"prompt": {"rank": 0}}, "greater"),
        ({"head": {"kind": "lpp"}}, "one of flm, fm, ilm, lp"),
        ({"optimizer": {"lr": float("nan")}}, "finite"),
        ({"dataset": {"name": "store"}}, "root"),
        ({"schedule": {"warmup_epochs": 3}}, "below epochs"),
        ({"method": "linear_probe", "head": {"kind": "flm"}}, "lp or fm"),
    ],
)
def test_what_cannot_work_is_refused(digits, changes, word):
    with pytest.raises(ValidationError, match=word):
        digits(**changes)


def test_config_is_frozen(digits):
    with pytest.raises(ValidationError):
        digits().epochs = 4


def test_names_in_the_config_are_those_that_exist():
    names = plugins.names("mappings")
    assert {name for name in names if list(mappings.load(name)(20, 8, 5).parameters())} == set(HEAD_MAPPINGS)
    assert set(DatasetConfig.model_fields["name"].annotation.__args__) == set(LOADERS)
    for folder in ("prompts", "methods"):
        for name in plugins.names(folder):
            plugins.load(folder, name)


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
