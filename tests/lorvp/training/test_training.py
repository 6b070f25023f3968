from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from conftest import count_forwards
from pydantic import ValidationError
from support import stops
from support.samples.training import figures

import lorvp
from lorvp import methods
from lorvp.bundle.format import describe
from lorvp.config import BackboneConfig, ScheduleConfig, TrialConfig
from lorvp.data import datasets
from lorvp.errors import TrialFailed, UserError
from lorvp.methods.base import Method
from lorvp.models.backbone import Backbone, resolve_precision
from lorvp.optim.optimizers import make_optimizer
from lorvp.optim.schedule import lr_factor
from lorvp.training import loop, precision, trainer
from lorvp.training.checkpoint import CHECKPOINT
from lorvp.training.loop import train
from lorvp.training.trainer import Trainer


@pytest.mark.parametrize(
    "mapping", ["ilm", "lp", *(pytest.param(m, marks=pytest.mark.slow) for m in ("rlm", "flm", "fm"))]
)
@pytest.mark.parametrize("stop_after", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_stopped_and_continued_is_bit_for_bit_uninterrupted(digits, tmp_path, mapping, stop_after):
    config = digits(head={"kind": mapping})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    expected = list(train(config, folder=whole))
    epochs = 0

    def stop() -> bool:
        return epochs >= stop_after

    first = []
    for result in train(config, folder=parts, should_stop=stop):
        first.append(result)
        epochs += 1
    assert len(first) == stop_after
    continued = list(train(config, folder=parts, resume_from=parts / CHECKPOINT))
    assert figures(continued) == figures(expected)
    assert continued[:stop_after] == first
    images = torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(lorvp.load(parts / "bundle")(images), lorvp.load(whole / "bundle")(images))
    final = [torch.load(folder / CHECKPOINT, weights_only=True) for folder in (whole, parts)]
    for name, tensor in final[0]["tuned"].items():
        assert torch.equal(tensor, final[1]["tuned"][name])
    assert str(final[0]["optimizers"]) == str(final[1]["optimizers"])


@cache
def uninterrupted(config: str) -> tuple[list[dict], int]:
    """Its results, and how many images it shows the backbone once the cache has what it needs."""
    wanted = TrialConfig.model_validate_json(config)
    expected = figures(list(train(wanted)))
    with pytest.MonkeyPatch.context() as monkeypatch:
        shown = count_forwards(monkeypatch)
        assert figures(list(train(wanted))) == expected
        return expected, sum(shown)


@pytest.mark.slow
@pytest.mark.parametrize("mapping", ["ilm", "lp", "ilm, rungs"])
@pytest.mark.parametrize("calls", range(1, 23))
def test_stopped_anywhere_and_continued_is_bit_for_bit_uninterrupted(digits, tmp_path, monkeypatch, mapping, calls):
    """Before any batch, of training, of a recount, of validation or of the test set; no batch is done twice.

    With rungs the recount of the second epoch is at another image size than the epoch before it.
    """
    mapping, _, rungs = mapping.partition(", ")
    stages = {"rungs": [{"epochs": 1, "image_size": 16}]} if rungs else {}
    config = digits(head={"kind": mapping}, epochs=2, batch_size=40, eval_batch_size=30, **stages)
    expected, images = uninterrupted(config.canonical_json())
    shown = count_forwards(monkeypatch)
    stop = stops.from_call(calls)
    first = list(train(config, folder=tmp_path, should_stop=stop))
    checkpoint = tmp_path / CHECKPOINT
    continued = list(train(config, resume_from=checkpoint if checkpoint.exists() else None))
    assert figures(continued) == expected
    assert figures(first) == expected[: len(first)]
    assert sum(shown) == images


def test_a_trial_goes_on_in_the_precision_that_it_began_in(digits, tmp_path, monkeypatch):
    """Requeued to another kind of machine, `auto` would be another."""
    config = digits(precision="auto", epochs=2)
    kinds = iter(("bf16", "fp32"))
    monkeypatch.setattr(precision, "choose", lambda *_: next(kinds))
    ends = iter((False,) * 6)
    first = list(train(config, folder=tmp_path, should_stop=lambda: next(ends, True)))
    continued = list(train(config, folder=tmp_path, resume_from=tmp_path / CHECKPOINT))
    assert first == continued[: len(first)]
    assert [result.precision for result in continued] == ["bf16", "bf16"]
    assert lorvp.load(tmp_path / "bundle").backbone.dtype == torch.bfloat16


def test_sgd_is_not_fused_where_steps_may_be_skipped(digits, monkeypatch):
    """A first step that fp16 skips would leave a fused one's momentum as it was allocated."""
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", True)  # torch fuses on CPUs, too
    for kind, fused in (("fp16", False), ("bf16", True)):
        made = make_optimizer(digits().head, 0.1, parameters, kind)
        assert (type(made), made.defaults["fused"]) == (torch.optim.SGD, fused)


def test_it_learns_and_the_test_set_is_read_once(digits):
    results = list(train(digits(epochs=6, prompt={"optimizer": "adam", "lr": 0.05}, optimizer={"lr": 1.0})))
    assert [r.test_top1 is None for r in results] == [True] * 5 + [False]
    assert max(r.val_top1 for r in results) > 50
    assert results[-1].train_loss < results[0].train_loss
    assert all(r.val_top5 >= r.val_top1 for r in results)
    assert results[0].lr == {"prompt": 0.05, "head": 1.0}
    assert results[-1].lr["head"] < results[0].lr["head"]


def test_test_set_sees_the_best_epochs_prompt(digits, tmp_path):
    config = digits(epochs=4)
    results = list(train(config, folder=tmp_path))
    model = lorvp.load(tmp_path / "bundle")
    from lorvp.data import datasets

    splits = datasets.load(config.dataset, 32)
    best = max(results, key=lambda r: r.val_top1)
    for images, top1 in ((splits.val, best.val_top1), (splits.test, results[-1].test_top1)):
        hits = model(images.read(range(len(images)))).argmax(1).numpy() == images.labels
        assert 100 * hits.mean() == pytest.approx(top1)


def test_the_last_training_ends_at_its_last_epoch(digits, tmp_path):
    """Trained on the validation images, too, a trial has nothing to choose an epoch by."""
    dataset = {"name": "digits", "max_per_class": 20, "val_fraction": 0.2, "train_on_val": True}
    config = digits(epochs=3, dataset=dataset, optimizer={"lr": 1.0}, schedule={"name": "constant"})
    results = list(train(config, folder=tmp_path))
    model = lorvp.load(tmp_path / "bundle")
    from lorvp.bundle.io import describe
    from lorvp.data import datasets

    assert max(r.val_top1 for r in results) > results[-1].val_top1
    splits = datasets.load(config.dataset, 32)
    assert len(splits.train) == 200
    for images, top1 in ((splits.val, results[-1].val_top1), (splits.test, results[-1].test_top1)):
        hits = model(images.read(range(len(images)))).argmax(1).numpy() == images.labels
        assert 100 * hits.mean() == pytest.approx(top1)
    assert describe(tmp_path / "bundle")["metrics"]["epoch"] == 3
    assert (
        "it is the last epoch, and was trained on the validation images" in (tmp_path / "bundle/README.md").read_text()
    )


def test_published_protocol_reads_the_test_set_every_epoch(digits, tmp_path):
    results = list(train(digits(select="test_best_epoch"), folder=tmp_path))
    assert all(r.test_top1 is not None for r in results)
    from lorvp.bundle.io import describe

    metrics = describe(tmp_path / "bundle")["metrics"]
    assert metrics["test_top1"] == max(r.test_top1 for r in results)
    assert "published protocol" in metrics["selection"]


def test_the_published_protocol_can_train_on_every_image(digits, tmp_path, monkeypatch):
    """val_fraction 0: nothing is held back, and the test set, read once an epoch, is what there is to choose by."""
    few = {"name": "digits", "max_per_class": 20}
    whole = digits(select="test_best_epoch", dataset=few | {"val_fraction": 0})
    splits = datasets.load(whole.dataset, 32)
    assert len(splits.train) == 200
    assert splits.val is splits.test
    read = []
    evaluate = trainer.evaluate
    for module in (trainer, loop):
        monkeypatch.setattr(module, "evaluate", lambda group, split: read.append(split) or evaluate(group, split))
    results = list(train(whole, folder=tmp_path))
    assert read == ["val"] * whole.epochs
    assert all((r.val_top1, r.val_loss) == (r.test_top1, r.test_loss) for r in results)
    metrics = describe(tmp_path / "bundle")["metrics"]
    assert metrics["test_top1"] == max(r.test_top1 for r in results)
    assert "trained on every image" in metrics["selection"]
    for values, message in (
        ({"dataset": few | {"val_fraction": 0}}, "select must be test_best_epoch"),
        (
            {"select": "test_best_epoch", "dataset": few | {"val_fraction": 0, "train_on_val": True}},
            "train_on_val must",
        ),
    ):
        with pytest.raises(ValidationError, match=message):
            digits(**values)


def test_a_loss_that_is_no_number_ends_the_trial(digits):
    config = digits(prompt={"lr": 1e30, "optimizer": "sgd"}, optimizer={"lr": 1e30})
    with pytest.raises(TrialFailed, match="train loss is nan in epoch 1"):
        list(train(config))


def test_a_backbone_that_moves_is_noticed(digits, monkeypatch):
    def touch(self: Method, epoch: int, *given: object) -> None:
        self.backbone.model.get_classifier().bias += 1e-3

    monkeypatch.setattr(Method, "start_epoch", touch)
    with pytest.raises(RuntimeError, match=r"frozen backbone moved during training: \S+bias$"):
        list(train(digits(epochs=1)))


def test_nothing_in_the_backbone_is_trained(digits):
    backbone = Backbone(digits().backbone, "fp32")
    backbone.train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_no_transfer_within_a_step(digits, monkeypatch):
    """Metrics are read at the end of an epoch: `item` and `tolist` are called as often with 12 steps as with 3."""
    calls = 0
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, original=original):
            nonlocal calls
            calls += 1
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    seen = []
    for batch_size in (40, 10):
        calls = 0
        shared = {"lr": 0.1, "name": "sgd", "clip_grad_norm": 1}
        list(train(digits(epochs=1, batch_size=batch_size, prompt={"optimizer": "sgd", "lr": 0.1}, optimizer=shared)))
        seen.append(calls)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("prompt_name", ["sgd", "adamw"])
def test_optimizers_of_prompt_and_head_differ_as_asked(digits, name, prompt_name):
    config = digits(
        epochs=1,
        prompt={"optimizer": prompt_name, "lr": 0.02, "weight_decay": 0.5},
        optimizer={"name": name, "lr": 0.01},
    )
    parameters = [torch.nn.Parameter(torch.ones(2))]
    method = Trainer(config, loop.load(config)).stage.method
    prompt = method.make_optimizer("prompt", parameters, "fp32")
    head = method.make_optimizer("head", parameters, "fp32")
    assert (type(head).__name__.lower(), type(prompt).__name__.lower()) == (name, prompt_name)
    assert (prompt.param_groups[0]["lr"], prompt.param_groups[0]["weight_decay"]) == (0.02, 0.5)
    assert (head.param_groups[0]["lr"], head.param_groups[0]["weight_decay"]) == (0.01, 1e-4)
    assert len(list(train(config))) == 1


def test_schedules():
    def shares(name: str, warmup: float) -> list[float]:
        schedule = ScheduleConfig(name=name, warmup_epochs=warmup)
        return [lr_factor(schedule, step, 10, 5) for step in range(10)]

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for share in shares("cosine", 0):
        assert share == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    assert shares("linear", 0) == pytest.approx([1 - step / 10 for step in range(10)])
    assert shares("constant", 0) == [1.0] * 10
    warmed = shares("constant", 1)
    assert warmed[:5] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])
    assert warmed[5:] == [1.0] * 5


@pytest.mark.parametrize("prompt", ["full_image", "border"])
def test_other_prompts_train(digits, prompt, tmp_path):
    results = list(train(digits(epochs=1, prompt={"kind": prompt}), folder=tmp_path))
    assert math.isfinite(results[0].val_loss)
    assert (tmp_path / "bundle" / "prompt.png").exists()


def test_same_head_with_and_without_a_prompt(digits):
    backbone = Backbone(digits().backbone, "fp32")
    made = [methods.make(digits(method=name), backbone, 10) for name in ("lorvp", "linear_probe")]
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(made[0](images), made[1](images))


def test_continuing_another_trial_is_refused(digits, tmp_path):
    list(train(digits(epochs=1), folder=tmp_path))
    with pytest.raises(UserError, match="the checkpoint of trial"):
        list(train(digits(epochs=2), resume_from=tmp_path / CHECKPOINT))


class FakeCuda:
    type = "cuda"


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_precision_is_what_the_hardware_has(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Quadro RTX 8000")
    assert resolve_precision("auto", FakeCuda()) == expected
    if expected == "fp16":
        with pytest.raises(UserError, match="Quadro RTX 8000 has no bf16"):
            resolve_precision("bf16", FakeCuda())


def test_auto_precision_of_a_cpu_is_what_is_quicker_there(digits, tmp_path, monkeypatch):
    """Measured once a machine and model; a sweep keeps what its first job chose."""
    monkeypatch.setenv("LORVP_CACHE", str(tmp_path))
    monkeypatch.setattr(precision, "resolve_precision", lambda wanted, _: "bf16" if wanted == "auto" else wanted)
    times = iter(({"bf16": 2.0, "fp32": 1.0}, {"bf16": 1.0, "fp32": 2.0}))
    monkeypatch.setattr(precision, "_seconds", lambda *_: next(times))
    cpu = torch.device("cpu")
    for config in (digits(precision="auto"), digits(precision="auto", optimizer={"lr": 0.3})):
        assert precision.choose(config, cpu) == "fp32"
    assert precision.choose(digits(precision="auto", batch_size=16), cpu) == "bf16"
    assert precision.choose(digits(precision="auto", batch_size=16), cpu, kept="fp32") == "fp32"
    assert precision.choose(digits(precision="bf16"), cpu, kept="fp32") == "bf16"


@pytest.mark.parametrize("method", ["lorvp", "linear_probe", "fine_tuning"])
def test_steps_are_timed_in_each_precision(digits, method):
    config = digits(precision="auto", method=method, prompt={}, optimizer={"lr": 0.1})
    seconds = precision._seconds(config, ("bf16", "fp32"))
    assert seconds.keys() == {"bf16", "fp32"}
    assert all(0 < each < math.inf for each in seconds.values())


def test_half_precision_runs_and_keeps_the_prompt_in_full(digits):
    results = list(train(digits(epochs=1, precision="bf16")))
    assert math.isfinite(results[0].train_loss)


def test_backbones_that_cannot_be_had(tmp_path):
    with pytest.raises(UserError, match="timm has no model 'resnet19'"):
        Backbone(BackboneConfig(name="resnet19"), "fp32")
    with pytest.raises(UserError, match="no such file"):
        Backbone(BackboneConfig(name="resnet18", checkpoint=tmp_path / "weights.safetensors"), "fp32")
    (tmp_path / "broken.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"backbone\.checkpoint: .*broken\.safetensors can't be read"):
        Backbone(BackboneConfig(name="resnet18", checkpoint=tmp_path / "broken.safetensors"), "fp32")


@pytest.mark.parametrize(
    ("name", "mean", "features"),
    [
        ("resnet18.tv_in1k", 0.485, 512),
        ("mobilenetv3_small_050", 0.485, 1024),
        ("vit_tiny_patch16_224.augreg_in21k", 0.5, 192),
        pytest.param("vit_base_patch16_224_miil.in21k", 0.0, 768, marks=pytest.mark.slow),
    ],
)
def test_statistics_and_head_are_the_models_own(name, mean, features):
    backbone = Backbone(BackboneConfig(name=name, pretrained=False), "fp32")
    assert backbone.mean.flatten()[0].item() == pytest.approx(mean)
    assert backbone.image_size == 224
    x = torch.rand(1, 3, 224, 224)
    with torch.inference_mode():
        read, logits = backbone(x, "features"), backbone(x, "logits")
        assert read.shape == (1, features)
        torch.testing.assert_close(backbone.model.get_classifier()(read), logits, rtol=1e-4, atol=1e-4)
    if "miil" in name:
        assert backbone.source_classes == 11221


def test_backbone_at_another_size():
    backbone = Backbone(
        BackboneConfig(name="vit_tiny_patch16_224", pretrained=False, image_size=64, mean=(0, 0, 0), std=(1, 1, 1)),
        "fp32",
    )
    assert backbone(backbone.prepare(torch.rand(1, 3, 40, 50)), "logits").shape == (1, 1000)


def test_resize_is_the_published_one():
    """torchvision's resize of the uint8 image, then ToTensor."""
    from torchvision.transforms import v2

    backbone = Backbone(BackboneConfig(name="lorvp_tiny_32", pretrained=False), "fp32")
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    expected = v2.functional.resize(images, [32, 32], antialias=True).float() / 255
    assert torch.equal(backbone.prepare(images), expected)
    same = torch.rand(2, 3, 32, 32)
    assert torch.equal(backbone.prepare(same), same)
