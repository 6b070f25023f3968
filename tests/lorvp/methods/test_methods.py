"""Each method against its definition in float64, and through a trial; small backbones without weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import effective
from PIL import Image
from pydantic import ValidationError
from scipy.special import erf
from support import stops
from support.samples.training import figures
from torch.nn import functional as F

from lorvp import methods, presets
from lorvp.config import SpeedConfig, TrialConfig
from lorvp.errors import UserError
from lorvp.features import probe
from lorvp.methods.base import Method
from lorvp.models import architectures
from lorvp.models.backbone import Backbone
from lorvp.training import loop
from lorvp.training.checkpoint import CHECKPOINT
from lorvp.training.loop import train
from lorvp.training.shared import SharedResources
from lorvp.training.trainer import Trainer, evaluate
from lorvp.utils.explain import explain

PLAIN = dict.fromkeys(SpeedConfig.model_fields, False)
VIT = {
    "name": "vit_tiny_patch16_224",
    "pretrained": False,
    "image_size": 32,
    "kwargs": {"depth": 3, "embed_dim": 48, "num_heads": 3, "patch_size": 8, "num_classes": 20},
}
SWIN = {
    "name": "swin_tiny_patch4_window7_224",
    "pretrained": False,
    "image_size": 56,
    "kwargs": {"depths": (2, 2), "num_heads": (2, 4), "embed_dim": 16, "num_classes": 20},
}
SELECTION = {"method": "vqt", "backbone": VIT, "adapter": {"group_lasso": 1e-4, "keep": 0.5}}
CNN = {"name": "lorvp_tiny_32", "pretrained": False}
GALORE = {"rank": 8, "update_gap": 4, "lr": 0.01}
METHODS: dict[str, dict[str, Any]] = {
    "lorvp": {"backbone": CNN},
    "lorvp, several": {"backbone": VIT, "head": {"kind": "ilm", "sources_per_class": 2}},
    "linear_probe": {"backbone": CNN},
    "fine_tuning": {"backbone": VIT},
    "fine_tuning, cnn": {"backbone": CNN, "head": {"kind": "ilm"}},
    "fine_tuning, lp-ft": {"backbone": VIT, "head": {"init": "fitted"}},
    "galore": {"backbone": VIT, "adapter": GALORE, "head": {"lr": 0.01}},
    "galore, per layer": {
        "backbone": VIT,
        "precision": "fp32",
        "adapter": GALORE | {"per_layer": True},
        "head": {"lr": 0.01},
    },
    "vpt": {"backbone": VIT, "adapter": {"count": 3}},
    "vpt, shallow and projected": {"backbone": VIT, "adapter": {"count": 3, "deep": False, "project": 7}},
    "vpt, dropout": {"backbone": VIT, "adapter": {"count": 3, "dropout": 0.5}},
    "vpt, swin": {"backbone": SWIN, "adapter": {"count": 3, "deep": False}},
    "vpt, cnn": {"backbone": CNN, "adapter": {"count": 3, "deep": False}},
    "vpt, flm": {"backbone": VIT, "adapter": {"count": 3}, "head": {"kind": "flm"}},
    "vqt": {"backbone": VIT, "adapter": {"count": 2}},
    "vqt, selection": {"backbone": VIT, "adapter": {"count": 2, "group_lasso": 1e-3, "keep": 0.5}, "epochs": 3},
    "vqt, warm": {"backbone": VIT, "adapter": {"count": 2}, "head": {"init": "fitted"}},
    "ilm_vp": {"backbone": CNN, "head": {"kind": "ilm"}},
    "autovp": {"backbone": CNN, "head": {"kind": "fm"}},
    "autovp, fixed": {"backbone": CNN, "prompt": {"scale": 0.75, "learn_scale": False}},
    "evp": {"backbone": CNN, "prompt": {"normalize_grad": True}},
    "acavp": {"backbone": CNN},
    "acavp, low rank": {"backbone": CNN, "prompt": {"additive": "low_rank", "scale": 1.0, "max_scale": 2.0}},
    "acavp, colours": {"backbone": VIT, "prompt": {"additive": "low_rank", "affine": False}, "head": {"kind": "flm"}},
    "lorvp+vpt": {"backbone": VIT, "adapter": {"count": 3}},
    "lorvp+vqt": {"backbone": VIT, "adapter": {"count": 2}},
    "lorvp+lp_ft": {"backbone": VIT},
}


VARIANTS = [pytest.param(case, marks=pytest.mark.slow if "," in case or "+" in case else ()) for case in METHODS]


def config(case: str, **changes: Any) -> TrialConfig:
    values: dict[str, Any] = {
        "method": case.split(",")[0],
        "dataset": {"name": "digits", "max_per_class": 10, "val_fraction": 0.2},
        "prompt": {"optimizer": "adam"},
        "optimizer": {"lr": 0.05},
        "epochs": 2,
        "batch_size": 32,
        "precision": "fp32",
    }
    return TrialConfig.model_validate(effective(effective(values, METHODS[case]), changes))


def loaded(wanted: TrialConfig) -> SharedResources:
    torch.manual_seed(0)  # the weights
    return loop.load(wanted)


def built(case: str, speed: dict[str, bool] = PLAIN, **changes: Any) -> Method:
    """The method in float64, its backbone's random weights large enough to matter."""
    wanted = config(case, speed=speed, **changes)
    torch.manual_seed(0)
    backbone = Backbone(wanted.backbone, "fp32", wanted.backbone_speed)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(std=0.3)
    return methods.make(wanted, backbone, 10).double()


def images(method: Method, count: int = 2) -> torch.Tensor:
    side = method.side
    return torch.rand(count, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", VARIANTS)
def test_continued_is_bit_for_bit_uninterrupted(case, tmp_path):
    wanted = config(case)
    expected = list(train(wanted, shared=loaded(wanted)))
    stop = stops.from_call(6)  # within the second epoch
    first = list(train(wanted, tmp_path, should_stop=stop, shared=loaded(wanted)))
    assert len(first) == 1
    assert (tmp_path / CHECKPOINT).exists()
    again = list(train(wanted, tmp_path, resume_from=tmp_path / CHECKPOINT, shared=loaded(wanted)))
    assert figures(again) == figures(expected)
    assert math.isfinite(expected[-1].train_loss)
    assert (tmp_path / "bundle" / "config.json").exists()


@pytest.mark.parametrize("case", VARIANTS)
def test_every_group_of_parameters_learns(case):
    wanted = config(case)
    trial = Trainer(wanted, loaded(wanted))
    trial.start_epoch(1)
    before = {name: [p.detach().clone() for p in group] for name, group in trial.stage.groups.items()}
    for batch in trial.batches():
        trial.train_step(*batch)
    for name, group in trial.stage.groups.items():
        moved = [not torch.equal(old, new) for old, new in zip(before[name], group, strict=True)]
        # keys' biases change nothing; a LoR-VP prompt's A moves from the second step on
        assert sum(moved) >= 0.8 * len(moved), name


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("lorvp", {"prompt": 6 * 32 * 4, "head": 1290}),
        ("ilm_vp", {"prompt": 3 * 32 * 32}),
        ("autovp", {"prompt": 3 * 32 * 32 + 1, "head": 10 * 10 + 10}),
        ("evp", {"prompt": 3 * 32 * 32, "head": 1290}),
        ("acavp", {"prompt": 2 * 3 * 32 * 32 + 7, "head": 1290}),
        ("acavp, low rank", {"prompt": 3 * 32 * 32 + 6 * 32 * 4 + 7, "head": 1290}),
        ("acavp, colours", {"prompt": 3 * 32 * 32 + 6 * 32 * 4}),
        ("vpt", {"adapter": 3 * 3 * 48, "head": 490}),
        ("vpt, shallow and projected", {"adapter": 3 * 7 + 7 * 48 + 48, "head": 490}),
        ("vpt, swin", {"adapter": 3 * 16, "head": 330}),
        ("vpt, cnn", {"adapter": 2 * 3 * 3 * 38 + 2 * 3 * 3 * 32, "head": 1290}),
        ("vqt", {"adapter": 3 * 2 * 48, "head": 10 * (48 + 3 * 2 * 48) + 10}),
        ("lorvp+vpt", {"prompt": 6 * 32 * 4, "adapter": 3 * 3 * 48, "head": 490}),
    ],
)
def test_parameters_as_the_papers_count_them(case, expected):
    groups = built(case).groups()
    assert {name: sum(p.numel() for p in group) for name, group in groups.items()} == expected


def test_ilm_vp_around_cifar_as_its_paper_counts_it():
    """3 (224² - 32²) numbers show, of 3 · 224² that are stored."""
    backbone = {"name": "resnet18", "pretrained": False}
    method = built("ilm_vp", backbone=backbone, prompt={"inner": 32})
    shown = method.prompt.mask(32).sum().item() * 3
    assert (shown, method.prompt.delta.numel()) == (147_456, 150_528)


def test_evp_as_its_paper_counts_it():
    """3 (224² - 164²) numbers show around the image, which a frame of 30 pixels surrounds."""
    method = built("evp", backbone={"name": "resnet18", "pretrained": False})
    torch.nn.init.ones_(method.prompt.delta)
    assert (method.side, method.input_prompt().sum().item()) == (164, 69_840)
    assert not method.input_prompt()[:, 30:194, 30:194].any()


def without_tokens(method: Method) -> Method:
    method.tokens = torch.nn.Parameter(method.tokens[:, :0])
    return method


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("lorvp", {}),
        ("linear_probe", {}),
        ("fine_tuning", {}),
        ("vpt", {}),
        ("vpt, swin", {}),
        ("ilm_vp", {"prompt": {"inner": 224}}),
        ("autovp", {"prompt": {"inner": 224, "learn_scale": False}}),
        ("evp", {"prompt": {"inner": 224}}),
        ("acavp, colours", {"prompt": {"max_gain": 2.0}}),
    ],
)
def test_without_a_prompt_it_is_the_frozen_backbone_bit_for_bit(case, changes):
    method = built(case, **changes)
    if case == "vpt":
        method = without_tokens(method)
    pixels = images(method)
    for output in ("features", "logits"):
        expected = method.backbone(pixels, output)
        if case == "vpt, swin":  # its windows are attended to together with none: the same sums, in another order
            torch.testing.assert_close(
                without_tokens(method).backbone_output(pixels, output), expected, rtol=1e-6, atol=1e-6
            )
        else:
            assert torch.equal(method.backbone_output(pixels, output), expected)


@pytest.mark.parametrize("speed", [PLAIN, SpeedConfig().model_dump()], ids=["plain", "fast"])
def test_vqt_leaves_what_the_backbone_says(speed):
    method = built("vqt", speed)
    pixels = images(method)
    own = F.normalize(method.backbone(pixels, "features"))
    assert torch.equal(method.backbone_output(pixels, "features")[:, :48], own)


# -- the transformer in NumPy


def weights(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


def norm(x: np.ndarray, w: dict, name: str) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * w[f"{name}.weight"] + w[f"{name}.bias"]


def attend(asking: np.ndarray, seen: np.ndarray, w: dict, heads: int) -> np.ndarray:
    """(N, q, d) attending to (N, n, d)."""
    d = asking.shape[-1]
    weight, bias = w["attn.qkv.weight"].reshape(3, d, d), w["attn.qkv.bias"].reshape(3, d)
    query, key, value = (
        (x @ weight[i].T + bias[i]).reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)
        for i, x in enumerate((asking, seen, seen))
    )
    scores = query @ key.transpose(0, 1, 3, 2) / math.sqrt(d / heads)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    mixed = (shares @ value).transpose(0, 2, 1, 3).reshape(asking.shape)
    return mixed @ w["attn.proj.weight"].T + w["attn.proj.bias"]


def mlp(x: np.ndarray, w: dict) -> np.ndarray:
    x = x @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
    return 0.5 * x * (1 + erf(x / math.sqrt(2))) @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]


def block(x: np.ndarray, w: dict, asking: np.ndarray | None = None) -> np.ndarray:
    """A layer's output at `asking`, by default at all of x, which attend to x."""
    at = x if asking is None else asking
    at = at + attend(norm(at, w, "norm1"), norm(x, w, "norm1"), w, heads=3)
    return at + mlp(norm(at, w, "norm2"), w)


def embedded(method: Method, pixels: torch.Tensor) -> np.ndarray:
    w = {name.replace("proj.conv.", "proj."): value for name, value in weights(method.backbone.model).items()}
    x = ((pixels - method.backbone.mean) / method.backbone.std).numpy()
    n, side, patch = len(x), x.shape[-1], 8
    x = x.reshape(n, 3, side // patch, patch, side // patch, patch).transpose(0, 2, 4, 1, 3, 5).reshape(n, -1, 192)
    x = x @ w["patch_embed.proj.weight"].reshape(48, -1).T + w["patch_embed.proj.bias"]
    return np.concatenate([np.repeat(w["cls_token"], n, 0), x], 1) + w["pos_embed"]


@pytest.mark.parametrize("speed", [PLAIN, SpeedConfig().model_dump()], ids=["plain", "fast"])
@pytest.mark.parametrize("case", ["vpt", "vpt, shallow and projected"])
def test_vpt_is_its_definition(case, speed):
    """Tokens after the class token, replaced at every layer, no pooling over them (Jia et al. 2022, section 3.2)."""
    method = built(case, speed)
    pixels = images(method)
    x, tokens = embedded(method, pixels), method.tokens.detach().numpy()
    if method.project:
        tokens = tokens @ weights(method.project)["weight"].T + weights(method.project)["bias"]
    for layer, timm_block in enumerate(built(case).backbone.model.blocks):
        if layer < len(tokens):
            rest = x[:, 1 + (3 if layer else 0) :]
            x = np.concatenate([x[:, :1], np.repeat(tokens[layer][None], len(x), 0), rest], 1)
        x = block(x, weights(timm_block))
    expected = norm(x, weights(method.backbone.model), "norm")[:, 0]
    np.testing.assert_allclose(
        method.backbone_output(pixels, "features").detach().numpy(), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("speed", [PLAIN, SpeedConfig().model_dump()], ids=["plain", "fast"])
def test_vqt_is_its_definition(speed):
    """As the public code computes it (andytu28/VQT, read and written anew).

    Queries stand before the layer's tokens and go through it with them, but lend no key and no value; what comes of
    them leaves the stream. Class token and each layer's q answers, these as one vector, are divided by their lengths.
    """
    method = built("vqt", speed)
    pixels = images(method)
    x, tokens = embedded(method, pixels), method.tokens.detach().numpy()
    count = tokens.shape[1]
    parts = []
    for layer, timm_block in enumerate(built("vqt").backbone.model.blocks):
        together = np.concatenate([np.repeat(tokens[layer][None], len(x), 0), x], 1)
        together = block(x, weights(timm_block), together)
        parts.append(together[:, :count].reshape(len(x), -1))
        x = together[:, count:]
    parts.insert(0, norm(x, weights(method.backbone.model), "norm")[:, 0])
    expected = np.concatenate([part / np.linalg.norm(part, axis=1, keepdims=True) for part in parts], 1)
    np.testing.assert_allclose(
        method.backbone_output(pixels, "features").detach().numpy(), expected, rtol=1e-5, atol=1e-6
    )


def test_vqt_starts_as_its_fitted_head():
    """Fitted to class tokens of length 1, as VQT's head reads them; the answers' weights are zero.

    At a C at which features that are rounded otherwise give the same head: at 1,000 they do not.
    """
    wanted = config("vqt, warm", head={"fit": 1.0})
    trial = Trainer(wanted, loaded(wanted))
    trial.start_epoch(1)
    train = trial.stage.splits.train
    pixels = trial.prepare(train.read(np.arange(len(train))))
    with torch.no_grad():
        own = trial.stage.method.backbone(pixels, "features")
        own = own / own.norm(dim=1, keepdim=True)
        labels = torch.from_numpy(train.labels)
        started = trial.stage.method(pixels)
    torch.testing.assert_close(started, F.linear(own, *probe.fit(own, labels, 10, 1.0)), rtol=1e-4, atol=1e-4)
    assert (started.argmax(1) == labels).float().mean() > 0.15  # it was fitted to something


@pytest.mark.parametrize("shifted", [False, True])
def test_tokens_in_swin_go_with_every_window(shifted):
    """One block, window by window, in NumPy: no place for tokens, so no bias; their outputs are averaged."""
    method = built("vpt, swin")
    timm_block = method.backbone.model.layers[0].blocks[int(shifted)]
    w = weights(timm_block)
    random = np.random.default_rng(0)
    x, tokens = random.normal(size=(2, 14, 14, 16)), random.normal(size=(2, 3, 16))
    shift = 3 if shifted else 0
    y = np.roll(swin_norm(x, w, "norm1"), (-shift, -shift), (1, 2))
    beside = swin_norm(tokens, w, "norm1")
    table = w["attn.relative_position_bias_table"][timm_block.attn.relative_position_index.numpy()]
    out, said = np.zeros_like(y), np.zeros((2, 3, 16))
    for image in range(2):
        for window in range(4):
            rows, columns = (slice(7 * i, 7 * i + 7) for i in divmod(window, 2))
            together = np.concatenate([beside[image], y[image, rows, columns].reshape(49, 16)])
            bias = np.zeros((2, 52, 52))
            bias[:, 3:, 3:] = table.transpose(2, 0, 1)
            if shifted:
                bias[:, 3:, 3:] += timm_block.attn_mask[window].numpy()
            seen = window_attention(together, bias, w)
            out[image, rows, columns] = seen[3:].reshape(7, 7, 16)
            said[image] += seen[:3] / 4
    x = x + np.roll(out, (shift, shift), (1, 2))
    tokens = tokens + said
    expected = x + mlp(swin_norm(x, w, "norm2"), w), tokens + mlp(swin_norm(tokens, w, "norm2"), w)
    from lorvp.adapters.vpt.adapter import _swin_block

    start = np.random.default_rng(0)
    given = torch.from_numpy(start.normal(size=(2, 14, 14, 16))), torch.from_numpy(start.normal(size=(2, 3, 16)))
    for ours, theirs in zip(_swin_block(timm_block, *given), expected, strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-8, atol=1e-8)


def swin_norm(x: np.ndarray, w: dict, name: str) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def window_attention(x: np.ndarray, bias: np.ndarray, w: dict) -> np.ndarray:
    d, heads = x.shape[1], len(bias)
    qkv = (x @ w["attn.qkv.weight"].T + w["attn.qkv.bias"]).reshape(len(x), 3, heads, d // heads)
    out = np.zeros_like(x)
    for head in range(heads):
        query, key, value = qkv[:, 0, head], qkv[:, 1, head], qkv[:, 2, head]
        scores = query @ key.T / math.sqrt(d / heads) + bias[head]
        shares = np.exp(scores - scores.max(1, keepdims=True))
        own = slice(head * d // heads, (head + 1) * d // heads)
        out[:, own] = shares / shares.sum(1, keepdims=True) @ value
    return out @ w["attn.proj.weight"].T + w["attn.proj.bias"]


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5])
def test_autovp_scales_the_padded_image(scale):
    """Each pixel is taken from where it lay before, bilinear, about the centre; the frame fills what is left."""
    method = built("autovp", prompt={"inner": 112, "scale": scale})
    torch.manual_seed(3)
    torch.nn.init.normal_(method.prompt.delta)
    pixels = images(method)
    padded = np.pad(pixels.numpy(), ((0, 0), (0, 0), (8, 8), (8, 8)))
    expected = np.zeros_like(padded)
    for row in range(32):
        for column in range(32):
            y, x = ((at - 15.5) / scale + 15.5 for at in (row, column))
            for dy in (0, 1):
                for dx in (0, 1):
                    i, j = math.floor(y) + dy, math.floor(x) + dx
                    share = (1 - abs(y - i)) * (1 - abs(x - j))
                    if 0 <= i < 32 and 0 <= j < 32:
                        expected[:, :, row, column] += share * padded[:, :, i, j]
    side = int(16 * scale)
    mask = np.ones((32, 32))
    start = (32 - side + 1) // 2
    mask[start : start + side, start : start + side] = 0
    expected += mask / (1 + np.exp(-method.prompt.delta.detach().numpy()))
    seen = method.transform_input(pixels) + method.input_prompt()
    np.testing.assert_allclose(seen.detach().numpy(), expected, rtol=1e-9, atol=1e-9)
    seen.square().sum().backward()
    assert method.prompt.scale.grad.abs() > 0


@pytest.mark.parametrize("inner", [112, 164, 224])
def test_evp_is_its_definition(inner):
    """The image in the middle as it is, and around it nothing but delta, with a gradient there alone."""
    method = built("evp", prompt={"inner": inner})
    side = round(inner * 32 / 224)
    assert method.side == side
    assert not method.input_prompt().any()
    assert method.is_identity_at_init() == (inner == 224)
    torch.manual_seed(3)
    torch.nn.init.normal_(method.prompt.delta)
    pixels, delta = images(method), method.prompt.delta.detach().numpy()
    expected = np.repeat(delta[None], len(pixels), 0)
    start = (32 - side + 1) // 2
    expected[:, :, start : start + side, start : start + side] = pixels.numpy()
    seen = method.transform_input(pixels) + method.input_prompt()
    np.testing.assert_array_equal(seen.detach().numpy(), expected)
    weighting = np.random.default_rng(0).standard_normal((len(pixels), 3, 32, 32))
    (seen * torch.from_numpy(weighting)).sum().backward()
    gradient = weighting.sum(0)
    gradient[:, start : start + side, start : start + side] = 0
    np.testing.assert_allclose(method.prompt.delta.grad.numpy(), gradient, rtol=1e-12, atol=1e-12)


def moved_by_hand(own: dict[str, np.ndarray], pixels: np.ndarray, scale: float, max_scale: float) -> np.ndarray:
    """What ACAVP's affine transformation makes of images (N, 3, L, L), by kornia's matrices and a loop over pixels.

    Pixel i lies at (i + 1/2)·(L - 1)/L, as in kornia 0.8 without aligned corners.
    """
    side = pixels.shape[-1]
    start = math.log(scale / (max_scale - scale))
    sx, sy = max_scale / (1 + np.exp(-own["scale"] - start))
    angle, (hx, hy) = 0.1 * np.tanh(own["angle"]), np.tan(0.1 * np.tanh(own["shear"]))
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    forward = rotation @ np.diag([sx, sy]) @ np.array([[1, -hx], [-hy, 1 + hx * hy]])
    shift = 0.05 * side * np.tanh(own["shift"])
    step = (side - 1) / side
    moved = np.zeros_like(pixels)
    for row in range(side):
        for column in range(side):
            at = np.array([(column + 0.5) * step, (row + 0.5) * step])
            x, y = np.linalg.solve(forward, at - shift) / step - 0.5
            for i in (math.floor(y), math.floor(y) + 1):
                for j in (math.floor(x), math.floor(x) + 1):
                    if 0 <= i < side and 0 <= j < side:
                        moved[:, :, row, column] += (1 - abs(y - i)) * (1 - abs(x - j)) * pixels[:, :, i, j]
    return moved


ACAVP = {
    "as published": {},
    "of half the size": {"scale": 0.5},
    "enlarged": {"scale": 1.0, "max_scale": 2.0, "max_gain": 3.0},
    "low rank": {"additive": "low_rank", "rank": 2},
}


@pytest.mark.parametrize("options", ACAVP)
def test_acavp_is_its_definition(options):
    """Moved, then multiplied, then the padding where nothing of the image is, or B A everywhere."""
    wanted = {"scale": 0.73, "max_scale": 1.0, "max_gain": 6.0} | ACAVP[options]
    method = built("acavp", prompt=ACAVP[options])
    torch.manual_seed(3)
    for parameter in method.prompt.parameters():
        torch.nn.init.normal_(parameter)
    own = weights(method.prompt)
    pixels = images(method)
    gain = wanted["max_gain"] / (1 + np.exp(-own["gain"]) * (wanted["max_gain"] - 1))
    placed = {"scale": wanted["scale"], "max_scale": wanted["max_scale"]}
    expected = moved_by_hand(own, pixels.numpy(), **placed) * gain
    if "padding" in own:
        empty = moved_by_hand(own, np.ones((1, 1, 32, 32)), **placed)[0] == 0
        assert empty.any() == (options != "enlarged")
        expected = expected + empty * own["padding"]
    else:
        expected = expected + own["low_rank.B"] @ own["low_rank.A"]
    seen = method.transform_input(pixels) + method.input_prompt()
    np.testing.assert_allclose(seen.detach().numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("additive", ["padding", "low_rank"])
def test_gradients_of_acavp_are_those_of_its_values(additive):
    """Against differences of the loss at values a little off, in float64; on smooth images, where these are exact."""
    method = built("acavp", prompt={"additive": additive})
    torch.manual_seed(3)
    for parameter in method.prompt.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ramp = torch.linspace(0.1, 0.9, 32, dtype=torch.float64)
    pixels = (ramp[:, None] * ramp + torch.tensor([[0.0], [0.1], [0.3]])[..., None])[None]
    weighting = torch.randn(3, 32, 32, dtype=torch.float64)

    def loss() -> torch.Tensor:
        return ((method.transform_input(pixels) + method.input_prompt()) * weighting).sum()

    loss().backward()
    for name, parameter in method.prompt.named_parameters():
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for place in torch.linspace(0, len(flat) - 1, min(len(flat), 5)).long().tolist():
            values = []
            for change in (1e-7, -2e-7):
                flat[place] += change
                values.append(loss().item())
            flat[place] += 1e-7
            assert gradient[place].item() == pytest.approx((values[0] - values[1]) / 2e-7, rel=1e-4, abs=1e-5), name


def test_acavp_starts_as_published():
    """The image at 0.73 of its size in the upper left corner, its colours as they are, zeros beside it."""
    method = built("acavp", backbone=CNN | {"image_size": 64})
    seen = method.transform_input(torch.ones(1, 3, 64, 64, dtype=torch.float64)) + method.input_prompt()
    side = round(0.73 * 64 - 1)  # inside of its edge, which is blurred
    torch.testing.assert_close(seen[..., :side, :side], torch.ones(1, 3, side, side, dtype=torch.float64))
    assert not seen[..., side + 2 :, :].any()
    assert not seen[..., side + 2 :].any()
    assert not method.is_identity_at_init()


@pytest.mark.parametrize(
    "prompt", [{"scale": 1.0, "max_scale": 2.0}, {"affine": False, "additive": "low_rank"}], ids=["affine", "colours"]
)
def test_acavp_that_starts_at_the_image_is_the_backbone(prompt):
    """Within the rounding of float32; a gain of one is limit · sigmoid, and a pixel's place is computed."""
    method = built("acavp", prompt={"additive": "low_rank"} | prompt).float()
    pixels = images(method).float()
    assert method.is_identity_at_init()
    torch.testing.assert_close(method.transform_input(pixels) + method.input_prompt(), pixels, rtol=0, atol=1e-5)
    expected = method.backbone(pixels, "features")
    torch.testing.assert_close(method.backbone_output(pixels, "features"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["acavp", "acavp, low rank", "autovp"])
def test_a_split_first_layer_gives_what_moves_the_image_its_gradient(case):
    """With what is learned of the image itself, both terms of conv(images) + conv(prompt) have gradients."""
    gradients = []
    for speed in (PLAIN, PLAIN | {"split_first_layer": True}):
        method = built(case, speed)
        torch.manual_seed(3)
        for parameter in method.prompt.parameters():
            torch.nn.init.normal_(parameter, mean=0.8, std=0.1)
        method.backbone_output(images(method), "features").square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in method.prompt.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, plain in gradients[0].items():
        assert plain.abs().max() > 0
        torch.testing.assert_close(gradients[1][name], plain, rtol=1e-8, atol=1e-8 * plain.abs().max().item())


@pytest.mark.parametrize("case", ["ilm_vp", "autovp, fixed"])
def test_a_small_image_goes_into_the_frame_as_it_is(case):
    """32 px within 64, grey around it; not to L and down again. Others are resized once, as PIL does."""
    prompt = {"inner": 112 if case == "ilm_vp" else 224, "scale": 0.5, "learn_scale": False}
    method = built(case, backbone=CNN | {"image_size": 64}, prompt=prompt)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    seen = method.transform_input(method.prepare(pixels)) + method.input_prompt()
    assert torch.equal(seen[:, :, 16:48, 16:48], (pixels.float() / 255).double())
    frame = torch.ones(64, 64, dtype=torch.bool)
    frame[16:48, 16:48] = False
    assert torch.equal(seen[:, :, frame], torch.full((2, 3, int(frame.sum())), 0.5, dtype=torch.float64))
    large = torch.randint(0, 256, (1, 3, 56, 56), dtype=torch.uint8)
    by_pil = Image.fromarray(large[0].permute(1, 2, 0).numpy()).resize((32, 32), Image.Resampling.BILINEAR)
    resized = method.prepare(large)[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(resized - np.asarray(by_pil)).max() <= 2  # torch's own kernel on a CPU (lorvp/data/resize.py)


def test_trials_whose_images_are_resized_otherwise_share_no_batches():
    frame = config("ilm_vp")
    assert not frame.packs_with(config("lorvp"))
    assert not frame.packs_with(config("ilm_vp", prompt={"inner": 64}))
    assert frame.packs_with(config("autovp"))
    assert not config("autovp").packs_with(config("autovp", prompt={"scale": 0.5, "learn_scale": False}))
    assert config("acavp").packs_with(config("lorvp"))
    assert not config("evp").packs_with(frame)
    assert config("evp", prompt={"inner": 128}).packs_with(frame)


def test_padding_of_a_convolutional_net_is_outside_the_image():
    method = built("vpt, cnn")
    pixels = images(method)
    seen = method.transform_input(pixels)
    assert seen.shape == (2, 3, 38, 38)
    assert torch.equal(seen[:, :, 3:-3, 3:-3], pixels)
    assert ((seen >= 0) & (seen <= 1)).all()


def one_epoch(trial: Trainer) -> None:
    trial.start_epoch(len(trial.results) + 1)
    for batch in trial.batches():
        trial.train_step(*batch)
    trial.end_training()
    trial.end_epoch(evaluate([trial], "val")[trial], packed=1)


def test_vqt_selects_in_three_stages():
    """As its public code: VQT; queries frozen, a new head under the penalty; a new head on what that one weighs most.

    Each has the whole schedule, and half the learning rate from the second on. Only the last one's epochs count.
    """
    wanted = config("vqt, selection", optimizer={"name": "adam", "lr": 0.02}, epochs=6)
    trial = Trainer(wanted, loaded(wanted))
    first, count = trial.stage.method, trial.stage.method.features()
    start = first.mapping.head.weight.detach().clone()
    one_epoch(trial)
    assert (first.penalty(), trial.stage.base_lr) == (None, {"adapter": 0.02, "head": 0.02})
    one_epoch(trial)
    assert trial.stage.method is first
    queries = first.tokens.detach().clone()
    trial.start_epoch(3)
    choosing = trial.stage.method
    assert trial.stage.base_lr == {"head": 0.01}
    assert torch.equal(choosing.tokens, queries)
    assert torch.equal(choosing.mapping.head.weight, start)
    norms = np.linalg.norm(start.numpy().astype(np.float64), axis=0)
    assert choosing.penalty().item() == pytest.approx(1e-3 * norms.sum(), rel=1e-5)
    one_epoch(trial)
    assert trial.results[2].lr == {"head": 0.01}  # where it begins anew
    one_epoch(trial)
    assert torch.equal(choosing.tokens, queries)
    assert choosing.kept.all()
    weights = choosing.mapping.head.weight.detach().norm(dim=0)
    one_epoch(trial)
    last = trial.stage.method
    assert (last.penalty(), trial.stage.base_lr) == (None, {"head": 0.01})
    assert torch.equal(last.kept.bool(), weights >= weights.sort(descending=True).values[count // 2 - 1])
    assert last.kept.sum() == count // 2
    assert trial.best["epoch"] == 5
    one_epoch(trial)
    assert torch.equal(last.tokens, queries)
    assert [result.whole for result in trial.results] == [False] * 4 + [True] * 2
    assert trial.results[-1].parameters == trial.results[0].parameters


def test_a_heavier_penalty_leaves_smaller_weights():
    found = []
    for lasso in (1e-6, 1.0):
        wanted = config("vqt, selection", adapter={"count": 2, "group_lasso": lasso, "keep": 0.5})
        trial = Trainer(wanted, loaded(wanted))
        one_epoch(trial)
        one_epoch(trial)
        found.append(trial.stage.method.mapping.head.weight.norm().item())
    assert found[1] < 0.9 * found[0]


def test_learning_rates_are_those_of_a_batch_of_256_where_asked():
    wanted = config("vpt", scale_lr=True, optimizer={"lr": 0.8})
    trial = Trainer(wanted, loaded(wanted))
    assert trial.stage.base_lr == {"adapter": pytest.approx(0.1), "head": pytest.approx(0.1)}


def reason(changes: dict[str, Any]) -> str:
    """Why a trial is refused before its job is submitted: by the config itself, or for its backbone's family."""
    try:
        wanted = TrialConfig.model_validate({"dataset": {"name": "digits"}} | changes)
    except ValidationError as error:
        return explain(error, TrialConfig)[1]
    problem = architectures.find_problem(wanted, architectures.from_timm())
    return "" if problem is None else problem[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "vqt", "backbone": {"name": "resnet18"}}, "vqt asks the layers of a vision transformer"),
        ({"method": "vqt", "backbone": VIT, "head": {"kind": "fm"}}, "head.kind must be lp"),
        ({"method": "vpt", "backbone": {"name": "resnet18"}}, "vpt is deep on vision transformers"),
        ({"method": "vpt", "backbone": SWIN}, "vpt is deep on vision transformers"),
        ({"method": "vpt", "backbone": CNN, "adapter": {"deep": False, "project": 3}}, "vpt pads its images"),
        ({"method": "vpt", "backbone": VIT, "adapter": {"count": 201}}, "less than or equal to 200"),
        ({"method": "lorvp+vpt", "backbone": CNN, "adapter": {"deep": False}}, "needs a backbone with tokens"),
        ({"method": "vpt+lorvp", "backbone": VIT}, "what goes together is a prompt and an adapter: lorvp+"),
        ({"method": "lorvp+linear_probe", "backbone": VIT}, "what goes together is a prompt and an adapter: lorvp+"),
        ({"method": "vtp", "backbone": VIT}, "unknown name 'vtp'; one of "),
        ({"method": "vqt", "backbone": VIT, "adapter": {"keep": 0.5}}, "adapter.group_lasso, which must be given"),
        ({"method": "vqt", "backbone": VIT, "adapter": {"group_lasso": 1e-4}}, "for adapter.keep, which must be given"),
        (SELECTION | {"epochs": 20}, "a multiple of 3, not 20"),
        (SELECTION | {"epochs": 30, "schedule": {"warmup_epochs": 10}}, "below a third of epochs"),
        (SELECTION | {"epochs": 30, "head": {"init": "fitted"}}, "head.init must be random"),
        (SELECTION | {"epochs": 30, "rungs": [{"epochs": 1}]}, "leave rungs out"),
        ({"method": "lp_ft", "backbone": VIT, "head": {"init": "random"}}, "lp_ft has head.init fitted, not random"),
        ({"method": "lp_ft", "backbone": VIT, "head": {"kind": "flm"}}, "kind must be fm or lp"),
        ({"method": "fine_tuning", "backbone": VIT, "rungs": [{"epochs": 1}]}, "trains the backbone"),
        ({"method": "vpt", "backbone": VIT, "rungs": [{"epochs": 1, "image_size": 16}]}, "one image_size to another"),
        (
            {"method": "galore", "backbone": VIT, "adapter": {"per_layer": True}},
            "precision must be bf16 or fp32",
        ),
    ],
)
def test_combinations_without_a_meaning(changes, message):
    assert message in reason(changes)


def test_a_transformer_of_another_kind_is_refused_by_the_job():
    backbone = Backbone(config("vqt").backbone, "fp32")
    backbone.model.blocks[0].attn = torch.nn.Identity()
    with pytest.raises(UserError, match="no plain vision transformer"):
        methods.make(config("vqt"), backbone, 10)


NARROW = {"depth": 2, "embed_dim": 192, "num_heads": 3}
PAPER = {
    "resnet18.tv_in1k": ({}, 64, 0.485),
    "resnet50.tv2_in1k": ({}, 64, 0.485),
    "vit_base_patch32_224.augreg_in21k_ft_in1k": (NARROW, 224, 0.5),
    "vit_base_patch16_224_miil.in21k": (NARROW, 224, 0.0),
    "swin_base_patch4_window7_224.ms_in22k": ({"depths": (2, 2, 2, 2), "embed_dim": 32}, 224, 0.485),
    "vit_base_patch32_clip_224.openai": (NARROW, 224, 0.48145466),
}
"""The paper's backbones, with fewer and narrower blocks or smaller images where they are large; their input's mean."""


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("method", presets.names())
def test_the_papers_backbones(method, name):
    kwargs, image_size, mean = PAPER[name]
    values = {
        "method": method,
        "backbone": {"name": name, "pretrained": False, "kwargs": kwargs, "image_size": image_size},
        "dataset": {"name": "digits"},
    }
    wanted = TrialConfig.model_validate(effective(values, {"adapter": {"count": 2, "deep": name.startswith("vit")}}))
    if method == "vqt" and not name.startswith("vit"):
        problem = architectures.find_problem(wanted, architectures.from_timm())
        assert problem is not None
        assert problem == ("adapter", f"vqt asks the layers of a vision transformer (vit_*, deit_*), not of {name}")
        return
    made = methods.make(wanted, Backbone(wanted.backbone, "fp32", wanted.backbone_speed), 10)
    assert made.backbone.mean.flatten()[0].item() == pytest.approx(mean)
    logits = made(torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8))
    assert logits.shape == (2, 10)
    logits.sum().backward()
    groups = {name: group for name, group in made.groups().items() if name != "adapter" or not wanted.trains_backbone}
    assert all(p.grad is not None for group in groups.values() for p in group)


@pytest.mark.slow
def test_resnet_50_of_imagenet_21k_p_from_a_file(tmp_path):
    """MIIL's weights are a file that timm doesn't name: classes, mean and deviation are said in the config."""
    kwargs = {"num_classes": 11221}
    torch.save(timm.create_model("resnet50", **kwargs).state_dict(), tmp_path / "resnet50_miil_21k.pth")
    backbone = {
        "name": "resnet50",
        "checkpoint": tmp_path / "resnet50_miil_21k.pth",
        "kwargs": kwargs,
        "mean": (0, 0, 0),
        "std": (1, 1, 1),
    }
    wanted = TrialConfig.model_validate({"backbone": backbone, "dataset": {"name": "digits"}, "head": {"kind": "flm"}})
    made = methods.make(wanted, Backbone(wanted.backbone, "fp32"), 10)
    assert (made.backbone.source_classes, made.backbone.mean.abs().max()) == (11221, 0)
    assert made(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 10)


def test_no_weight_decay_is_not_another_optimizer():
    for name in ("sgd", "adamw"):
        with_it, without = (
            Trainer(wanted, loaded(wanted))
            for wanted in (config("vpt", optimizer={"name": name, "weight_decay": decay}) for decay in (0.01, 0.0))
        )
        assert {key: type(each) for key, each in with_it.stage.optimizers.items()} == {
            key: type(each) for key, each in without.stage.optimizers.items()
        }


@pytest.mark.parametrize("case", VARIANTS)
def test_images_are_left_as_they_are(case):
    """VPT's public code normalises the images that it has cached again in every epoch."""
    method = built(case)
    pixels = images(method)
    before = pixels.clone()
    assert (
        torch.equal(method.backbone_output(pixels, "features"), method.backbone_output(pixels, "features"))
        or "dropout" in case
    )
    assert torch.equal(pixels, before)
