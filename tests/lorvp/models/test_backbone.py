"""Backbones: which names there are, which weights fit, and what is said of those that don't."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from conftest import digits_values
from timm.models import _hub
from typer.testing import CliRunner

from lorvp import methods
from lorvp.bundle import io as bundle
from lorvp.config import BackboneConfig, TrialConfig
from lorvp.errors import UserError
from lorvp.models import architectures
from lorvp.models.backbone import Backbone
from lorvp.training.loop import train
from sweeps import launch
from sweeps.results import rows
from sweeps.spec import file as spec_file

SMALL = {"depth": 2, "embed_dim": 64, "num_heads": 2}
WITHOUT_CLASSIFIER = {
    "vit_small_patch14_dinov2.lvd142m": SMALL,
    "vit_base_patch16_siglip_224.webli": SMALL,
    "eva02_tiny_patch14_224.mim_in22k": {"depth": 2},
}
SPEC = """\
name: asked
trial:
  backbone: {BACKBONE}
  dataset: {name: digits}
  head: {kind: lp}
  epochs: 1
space:
  prompt.rank: {choice: [1, 2]}
search: {algorithm: grid}
"""
OWN = """
from timm.models import build_model_with_cfg, register_model
from timm.models.vision_transformer import VisionTransformer

@register_model
def NAME(pretrained=False, **kwargs):
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    return build_model_with_cfg(VisionTransformer, "NAME", pretrained, **shape | kwargs)
"""
STATISTICS = {"image_size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


def trial(backbone: dict, **changes) -> TrialConfig:
    return TrialConfig.model_validate(digits_values(backbone=backbone, **changes))


def refused(folder: Path, backbone: dict, *changes: str) -> str:
    """The one line by which a spec with such a backbone is refused, with nothing written."""
    path = folder / "sweep.yaml"
    path.write_text(SPEC.replace("{BACKBONE}", json.dumps(backbone)))
    before = sorted(folder.rglob("*"))
    sets = [word for change in changes for word in ("--set", change)]
    result = CliRunner().invoke(launch.app, [str(path), "--set", f"output={folder / 'runs'}", *sets])
    assert result.exit_code == 2, result.output
    assert result.output.count("\n") == 1, result.output
    assert sorted(folder.rglob("*")) == before
    return result.output


# -- without a classifier


@pytest.mark.parametrize("name", WITHOUT_CLASSIFIER)
def test_features_are_enough_for_lp(name):
    backbone = {"name": name, "pretrained": False, "kwargs": WITHOUT_CLASSIFIER[name], "image_size": 28 * 4}
    config = trial(backbone)
    built = Backbone(config.backbone, "fp32")
    images = torch.rand(2, 3, built.image_size, built.image_size)
    assert built.source_classes == 0
    assert built(images, "features").shape == (2, built.features)
    within = ["lorvp", "fine_tuning", "linear_probe"] + (["vqt"] if name.startswith("vit") else [])
    for method in within:
        made = methods.make(trial(backbone, method=method), built, 10)
        logits = made(images)
        assert logits.shape == (2, 10)
        logits.sum().backward()
        assert all(p.grad is not None for p in made.groups()["head"])
    for mapping in ("rlm", "flm", "ilm", "fm"):
        with pytest.raises(UserError, match=f"head {mapping} reads source classes, and {name} has no"):
            methods.make(trial(backbone, head={"kind": mapping}), built, 10)


@pytest.mark.parametrize("mapping", ["rlm", "flm", "ilm", "fm"])
def test_a_mapping_of_source_classes_is_refused_with_the_spec(mapping, tmp_path):
    for name in WITHOUT_CLASSIFIER:
        said = refused(tmp_path, {"name": name}, f"trial.head.kind={mapping}")
        assert f"head {mapping} reads source classes, and {name} has no classifier: head.kind must" in said
    cut = {"name": "resnet18.a1_in1k", "kwargs": {"num_classes": 0}}
    assert "resnet18.a1_in1k has no classifier" in refused(tmp_path, cut, f"trial.head.kind={mapping}")
    axis = f"space.head.kind={{choice: [lp, {mapping}]}}"
    assert f"space.head.kind.choice[1]: head {mapping} reads" in refused(tmp_path, {"name": name}, axis)
    control = f"control.head.kind=[{mapping}]"
    assert f"control.head.kind: head {mapping} reads" in refused(tmp_path, {"name": name}, control)


def test_a_trial_without_a_classifier_trains_and_loads(tmp_path):
    backbone = {"name": "lorvp_tiny_vit_32.cifar10", "kwargs": {"num_classes": 0}}
    (result,) = train(trial(backbone, epochs=1, head={"init": "fitted"}), tmp_path)
    assert result.val_top1 > 50
    assert bundle.load(tmp_path / "bundle").backbone.source_classes == 0


# -- names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", "timm has no model 'resnet81'; near: resnet18"),
        ("vit_base_pach16_224.augreg_in21k", "near: vit_base_patch16_224.augreg_in21k"),
        ("resnet18.a1_in2k", "timm has no weights 'a1_in2k' of resnet18; it has resnet18.a1_in1k"),
        ("lorvp_tiny_32.cifar100", "it has lorvp_tiny_32.cifar10"),
        ("vit_tiny_patch16_224_in21k.augreg", "timm has no weights 'augreg' of vit_tiny_patch16_224"),
        ("timm/resnet18.a1_in1k", "hf-hub:timm/resnet18.a1_in1k is one of the hub, local-dir:timm/resnet18.a1_in1k"),
        ("hub:timm/resnet18", "must be a timm name, hf-hub:OWNER/NAME or local-dir:FOLDER"),
        ("local-dir:", "must be a timm name, hf-hub:OWNER/NAME or local-dir:FOLDER"),
        ("hf-hub:a/b/c", "is no name of a model"),
        ("resnet18d", ""),
    ],
)
def test_names_that_are_refused_before_a_job(name, message, tmp_path):
    if not message:  # as timm has it, and no weights of it
        name = next(each for each in timm.list_models() if not timm.is_model_pretrained(each))
        message = f"timm has no weights of {name}"
    said = refused(tmp_path, {"name": name})
    assert "trial.backbone.name: " in said
    assert message in said
    with pytest.raises((UserError, ValueError), match=r"backbone|must be|hf-hub:"):
        Backbone(BackboneConfig(name=name), "fp32")


def test_names_on_an_axis_are_refused_where_they_stand(tmp_path):
    axis = "space.backbone.name={choice: [resnet18.a1_in1k, resnet34.a1_in2k]}"
    said = refused(tmp_path, {"name": "resnet18.a1_in1k"}, axis)
    assert "space.backbone.name.choice[1]: timm has no weights 'a1_in2k' of resnet34" in said


def test_deprecated_names_are_those_that_timm_takes_them_for():
    for old, tag in (("vit_tiny_patch16_224_in21k", "augreg_in21k"), ("vit_tiny_patch16_384", "")):
        backbone = Backbone(BackboneConfig(name=old, pretrained=False, kwargs=SMALL, image_size=64), "fp32")
        assert backbone.model.pretrained_cfg["tag"] == tag or not tag
        assert backbone.image_size == 64
    deprecated = timm.models.get_deprecated_models()
    known, today = architectures.from_timm(), timm.list_models(include_tags=True)
    for old, new in deprecated.items():
        if new.partition(".")[2] and new not in today:
            continue  # timm itself has lost it
        problem = architectures.find_backbone_problem(BackboneConfig(name=old, pretrained=False), known)
        assert (known.current(old), problem) == (new, None)


@pytest.mark.slow
def test_what_timm_has_is_told_without_torch_and_kept(tmp_path):
    code = "import sys; from lorvp.models import architectures; known = architectures.load_registry(); "
    code += "print(len(known.architectures), 'lorvp_tiny_32' in known.architectures, 'torch' in sys.modules)"

    def told(**changes: str) -> str:
        environment = os.environ | {"LORVP_CACHE": str(tmp_path)} | changes
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout

    assert told() == f"{len(architectures.from_timm().architectures)} True False\n"
    (kept,) = tmp_path.glob("timm-*.json")
    values = json.loads(kept.read_text())
    values["architectures"]["another"] = {}
    kept.write_text(json.dumps(values))
    assert told() == f"{len(values['architectures'])} True False\n"
    kept.unlink()
    kept.mkdir()  # neither to be read nor to be replaced
    assert told() == f"{len(values['architectures']) - 1} True False\n"


# -- from a folder, from the hub


@pytest.fixture
def saved(tmp_path) -> Path:
    """A model as timm saves it for the hub."""
    model = timm.create_model("lorvp_tiny_vit_32.cifar10", pretrained=True)
    _hub.save_for_hf(model, tmp_path / "saved", safe_serialization=True)
    return tmp_path / "saved"


def changed(folder: Path, change) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def test_a_model_from_a_folder(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = BackboneConfig(name="local_dir:saved")
    assert config.name == f"local-dir:{saved}"
    backbone, plain = (Backbone(each, "fp32") for each in (config, BackboneConfig(name="lorvp_tiny_vit_32.cifar10")))
    assert backbone.digest == plain.digest
    assert (backbone.image_size, backbone.source_classes) == (32, 10)
    assert backbone.std.flatten().tolist() == [0.25] * 3
    assert rows.network(config) == ("saved", "unknown")
    path = tmp_path / "sweep.yaml"
    path.write_text(SPEC.replace("{BACKBONE}", "{name: 'local-dir:saved'}"))
    assert spec_file.load(path).trial["backbone"]["name"] == config.name

    changed(saved, lambda values: values["pretrained_cfg"].pop("mean"))
    said = refused(tmp_path, {"name": "local-dir:saved"})
    assert f"trial.backbone: {config.name} comes without a pretrained_cfg that says it: give mean" in said
    assert Backbone(config.model_copy(update={"mean": (0, 0, 0)}), "fp32").mean.tolist() == [[[0]]] * 3
    changed(saved, lambda values: values.update(architecture="resnet81"))
    assert "is of architecture 'resnet81', which timm does not have" in refused(tmp_path, {"name": config.name})
    changed(saved, lambda values: values.update(architecture="lorvp_tiny_vit_32", num_classes=0))
    given = {"name": config.name, "mean": [0, 0, 0]}
    assert "has no classifier" in refused(tmp_path, given, "trial.head.kind=fm")
    (saved / "config.json").write_text("[")
    assert "config.json: not JSON" in refused(tmp_path, {"name": config.name})
    (saved / "config.json").unlink()
    assert "config.json: no such file or directory" in refused(tmp_path, {"name": config.name})


class Hub(BaseHTTPRequestHandler):
    """Gives the files of one repository as the hub does, and 404 for others."""

    def __init__(self, folder: Path, *arguments) -> None:
        self.folder = folder
        super().__init__(*arguments)

    def do_GET(self) -> None:
        owner, name, _, revision, file = (*self.path.split("?")[0].strip("/").split("/", 4), "", "", "", "")[:5]
        path = self.folder / file
        found = (owner, name) == ("me", "tiny") and revision in ("main", "v1") and path.is_file()
        content = path.read_bytes() if found else b""
        self.send_response(200 if found else 404)
        if found:
            self.send_header("ETag", f'"{len(content)}"')
            self.send_header("X-Repo-Commit", ("0" if revision == "v1" else "1") * 40)
        elif (owner, name) == ("me", "tiny"):
            self.send_header("X-Error-Code", "EntryNotFound")
        else:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *arguments) -> None:
        pass


FROM_HUB = """
import sys
from lorvp.models.backbone import Backbone
from lorvp.config import BackboneConfig
from lorvp.errors import UserError
for name in sys.argv[1:]:
    try:
        backbone = Backbone(BackboneConfig(name=name), "fp32")
        print(backbone.digest, backbone.image_size, backbone.hub_id)
    except UserError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_model_from_the_hub(saved, tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, saved)) as server:
        threading.Thread(target=server.serve_forever).start()
        # a machine without internet may have HF_HUB_OFFLINE set, or a proxy that doesn't know this hub
        own = ("HF_", "HUGGING_FACE_", "TRANSFORMERS_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        here = {name: value for name, value in os.environ.items() if not name.upper().startswith(own)}
        here |= {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
        environment = here | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}

        def launched(name: str, *options: str, **changes: str) -> str:
            path = tmp_path / "sweep.yaml"
            path.write_text(SPEC.replace("{BACKBONE}", json.dumps({"name": name})))
            command = [sys.executable, launch.__file__, str(path), f"--set=output={tmp_path / 'runs'}", *options]
            done = subprocess.run(command, env=environment | changes, capture_output=True, text=True)
            return done.stdout + done.stderr

        def built(*names: str, **changes: str) -> list[str]:
            command = [sys.executable, "-c", FROM_HUB, *names]
            done = subprocess.run(command, env=environment | changes, capture_output=True, text=True, check=True)
            return done.stdout.splitlines()

        try:
            said = launched("hf-hub:me/tony")
            assert "trial.backbone.name: the hub has no hf-hub:me/tony for you (HTTP 404)" in said
            assert not (tmp_path / "runs").exists()
            plain = Backbone(BackboneConfig(name="lorvp_tiny_vit_32.cifar10"), "fp32")
            assert built("hf-hub:me/tiny@v1") == [f"{plain.digest} 32 me/tiny@v1"]
            changed(saved, lambda values: values.update(num_classes=0))
            said = launched("hf-hub:me/tiny", "--set=trial.head.kind=fm")
            assert "head fm reads source classes, and hf-hub:me/tiny has no classifier" in said
            assert not (tmp_path / "runs").exists()
        finally:
            server.shutdown()
    # what was downloaded is enough, and what was not is for the job to find out
    there, not_there = built("hf-hub:me/tiny@v1", "hf-hub:me/other", HF_HUB_OFFLINE="1")
    assert there.startswith(plain.digest)
    assert "me/other: can't be built from" in not_there


# -- checkpoints


TINY = "lorvp_tiny_vit_32.cifar10"


def state() -> dict[str, torch.Tensor]:
    return dict(timm.create_model(TINY, pretrained=True).state_dict())


def prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def headless(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}


def loaded(tensors: object, folder: Path, **changes) -> Backbone:
    torch.save(tensors, folder / "weights.pth")
    config = {"name": TINY, "checkpoint": folder / "weights.pth"} | changes
    return Backbone(BackboneConfig.model_validate(config), "fp32")


def other() -> dict[str, torch.Tensor]:
    """Weights of the same shapes."""
    return {name: tensor + 1 for name, tensor in state().items()}


WRAPPED = {
    "plain": lambda: state(),
    "safetensors' kind of names": lambda: prefixed("model.", state()),
    "DDP, compiled": lambda: {"state_dict": prefixed("module._orig_mod.", state()), "epoch": 3},
    "timm, with an average": lambda: {"state_dict": other(), "state_dict_ema": state(), "arch": "x", "epoch": 3},
    "MoCo": lambda: {
        "epoch": 3,
        "state_dict": prefixed("module.encoder_q.", state())
        | prefixed("module.encoder_k.", other())
        | {"module.queue": torch.zeros(128, 9)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
    },
    "DINO": lambda: {
        "student": prefixed("module.backbone.", other())
        | prefixed("module.head.", {"mlp.0.weight": torch.zeros(3, 3)}),
        "teacher": prefixed("backbone.", state()),
        "args": None,
    },
    "Lightning": lambda: {"state_dict": prefixed("student.", state()), "hyper_parameters": {"lr": 0.1}},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_prefixes_are_taken_off(kind, tmp_path, capsys):
    backbone = loaded(WRAPPED[kind](), tmp_path)
    assert backbone.digest == Backbone(BackboneConfig(name=TINY), "fp32").digest
    assert ("weights: those under " in capsys.readouterr().out) == (kind != "plain")


@pytest.mark.parametrize("kind", ["none", "of another kind", "wrapped"])
def test_without_a_head_there_are_features(kind, tmp_path):
    tensors = headless(state())
    if kind == "of another kind":  # as MoCo's, which is trained with layers in the head's place
        tensors |= {"head.0.weight": torch.zeros(96, 96), "head.2.weight": torch.zeros(128, 96)}
    backbone = loaded(prefixed("module.encoder_q.", tensors) if kind == "wrapped" else tensors, tmp_path)
    assert backbone.source_classes == 0
    plain = Backbone(BackboneConfig(name=TINY), "fp32")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(backbone(images, "features"), plain(images, "features"))
    config = trial({"name": TINY}, head={"kind": "flm"})
    with pytest.raises(UserError, match="head flm reads source classes"):
        methods.make(config, backbone, 10)
    assert methods.make(trial({"name": TINY}), backbone, 10)(images).shape == (2, 10)


def test_a_head_for_other_classes(tmp_path):
    tensors = headless(state()) | {"head.weight": torch.ones(7, 96), "head.bias": torch.arange(7.0)}
    backbone = loaded(tensors, tmp_path)
    assert backbone.source_classes == 7
    logits = backbone(torch.rand(2, 3, 32, 32), "logits")
    torch.testing.assert_close(logits - logits[:, :1], torch.arange(7.0).expand(2, 7), rtol=0, atol=1e-4)
    with pytest.raises(UserError, match=r"does not fit: head.weight is \[7, 96\], and should be \[10, 96\]"):
        loaded(tensors, tmp_path, kwargs={"num_classes": 10})
    with pytest.raises(UserError, match=r"does not fit: head.weight is missing, and should be"):
        loaded(headless(state()), tmp_path, kwargs={"num_classes": 10})


def test_what_timm_makes_of_published_weights(tmp_path):
    """DINOv2's names for registers, and its position embedding of another size."""
    name = "vit_small_patch14_reg4_dinov2"
    kwargs = SMALL | {"img_size": 56}
    model = timm.create_model(name, **kwargs)
    theirs = {key.replace("reg_token", "register_tokens"): tensor for key, tensor in model.state_dict().items()}
    position = theirs.pop("pos_embed")
    theirs |= {"mask_token": torch.zeros(1, 64), "pos_embed": torch.cat([torch.zeros(1, 1, 64), position], dim=1)}
    backbone = loaded({"teacher": prefixed("backbone.", theirs)}, tmp_path, name=name, kwargs=SMALL, image_size=56)
    assert torch.equal(backbone.model.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)
    assert torch.equal(backbone.model.reg_token, model.reg_token)
    larger = loaded({"teacher": prefixed("backbone.", theirs)}, tmp_path, name=name, kwargs=SMALL, image_size=84)
    assert larger.model.pos_embed.shape == (1, 36, 64)
    assert torch.equal(larger.model.reg_token, model.reg_token)
    assert "state_dict" not in larger.model.pretrained_cfg


MISFITS = {
    "another depth": (
        lambda: state() | {"blocks.4.norm1.weight": torch.zeros(96)},
        "does not fit: blocks.4.norm1.weight has no place in the model$",
    ),
    "half of it": (
        lambda: {k: v for k, v in state().items() if not k.startswith("blocks.3.")},
        r"does not fit: blocks.3.norm1.weight is missing; .* is missing; .* is missing; and \d+ more$",
    ),
    "another width": (
        lambda: state() | {"norm.weight": torch.zeros(64)},
        r"does not fit: norm.weight is \[64\], and should be \[96\]$",
    ),
    "of another net": (lambda: {"conv9.weight": torch.zeros(3)}, "none of its 1 names is the model's: conv9.weight$"),
    "no tensors": (lambda: {"epoch": 3, "loss": 0.5}, "has no tensors by name"),
    "a number": (lambda: 3, "has no tensors by name"),
    "a module": (lambda: torch.nn.Linear(2, 2), "holds other Python objects than tensors: save its state_dict alone$"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_what_does_not_fit_is_said_by_name_and_shape(kind, tmp_path):
    make, message = MISFITS[kind]
    with pytest.raises(UserError, match=message) as found:
        loaded(make(), tmp_path)
    assert "\n" not in str(found.value)
    assert str(tmp_path / "weights.pth") in str(found.value)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 and no more"])
def test_files_that_hold_no_weights(content, tmp_path):
    for name in ("weights.pth", "weights.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=r"backbone.checkpoint: \S+ can't be read: .") as found:
            Backbone(BackboneConfig(name=TINY, checkpoint=tmp_path / name), "fp32")
        assert "\n" not in str(found.value)


# -- architectures of the user's own


@pytest.fixture
def own(tmp_path) -> dict:
    """A backbone that a file registers, of a name that no other test has, and weights of it."""
    name = f"own_{tmp_path.name}".replace("-", "_")
    (tmp_path / "mine.py").write_text(OWN.replace("NAME", name))
    return {"name": name, "module": str(tmp_path / "mine.py"), "pretrained": False}


def test_an_architecture_of_the_users_own(own, tmp_path):
    said = refused(tmp_path, own)
    assert (
        f"trial.backbone: {own['name']} comes without a pretrained_cfg that says it: give image_size, mean, st" in said
    )
    with pytest.raises(UserError, match=r"backbone: own_.* give image_size, mean, std"):
        Backbone(BackboneConfig.model_validate(own), "fp32")
    assert f"timm has no weights of {own['name']}: set checkpoint" in refused(tmp_path, own | {"pretrained": True})
    config = trial(own | STATISTICS, epochs=1)
    backbone = Backbone(config.backbone, "fp32")
    assert (backbone.features, backbone.source_classes, backbone.image_size) == (48, 5, 32)
    torch.manual_seed(0)
    (result,) = train(config, tmp_path)
    assert result.train_loss > 0


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import nothing_of_this_name", "can't be run: ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("x = (", "can't be run: SyntaxError: '(' was never closed"),
        ("x = 1", "timm has no model 'own', nor does"),
    ],
)
def test_files_that_register_nothing(code, message, tmp_path):
    (tmp_path / "mine.py").write_text(code)
    backbone = {"name": "own", "module": str(tmp_path / "mine.py")}
    assert message in refused(tmp_path, backbone)
    with pytest.raises(UserError, match=r"backbone.*own|mine"):
        Backbone(BackboneConfig.model_validate(backbone), "fp32")
    (tmp_path / "mine.py").unlink()
    assert "trial.backbone.module: no such file" in refused(tmp_path, backbone)


LOADED = """
import sys, lorvp
from lorvp.errors import UserError
folder, file = sys.argv[1:]
try:
    lorvp.load(folder)
except UserError as error:
    print(error)
print(lorvp.load(folder, module=file).classes)
"""


@pytest.mark.slow
def test_a_bundle_does_not_run_a_file_by_itself(own, tmp_path):
    backbone = own | STATISTICS | {"checkpoint": weights(own, tmp_path), "pretrained": True}
    list(train(trial(backbone, epochs=1), tmp_path))
    moved = tmp_path / "elsewhere.py"
    Path(own["module"]).rename(moved)
    command = [sys.executable, "-c", LOADED, str(tmp_path / "bundle"), str(moved)]
    refusal, classes = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "is registered by a file of its own, mine.py: it runs if you name it (--module FILE)" in refusal
    assert classes == "10"


def weights(own: dict, folder: Path) -> str:
    from safetensors.torch import save_file

    model = Backbone(BackboneConfig.model_validate(own | STATISTICS), "fp32").model
    plain = timm.create_model(model.pretrained_cfg["architecture"])
    save_file(plain.state_dict(), folder / "weights.safetensors")
    return str(folder / "weights.safetensors")
