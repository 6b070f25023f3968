"""Each method's forward and three of its optimizer's steps, against the public code's definition in float64.

The definitions are read from the public code and written anew, on tensors and by hand: no module, optimizer or loop of
ours is in them. The frozen network's own layers are timm's in both. GaLore's steps are held in test_galore.py, the
fitted head in test_frozen.py, label mappings in test_mapping.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_methods import PLAIN, config, loaded
from torch.func import functional_call
from torch.nn import functional as F

from lorvp.methods.base import Method
from lorvp.training.trainer import Trainer

Tensors = dict[str, torch.Tensor]
Logits = Callable[[Tensors, Method, torch.Tensor], torch.Tensor]


def network(method: Method, x: torch.Tensor, features: bool, weights: Tensors | None = None) -> torch.Tensor:
    """timm's model in float64 on pixels in [0, 1]: its logits, or what its classifier reads."""
    model = method.backbone.model
    own = {name: tensor.double() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    x = (x - method.backbone.mean.double()) / method.backbone.std.double()
    read: list[torch.Tensor] = []
    handle = model.get_classifier().register_forward_pre_hook(lambda _, given: read.append(given[0]))
    try:
        logits = functional_call(model, own | (weights or {}), x)
    finally:
        handle.remove()
    return read[0] if features else logits


def head(own: Tensors, x: torch.Tensor) -> torch.Tensor:
    return x @ own["mapping.head.weight"].T + own["mapping.head.bias"]


def lorvp(own: Tensors, method: Method, x: torch.Tensor) -> torch.Tensor:
    """jincan333/LoR-VP: B A on the resized image, before it is normalised; a new head on the features."""
    return head(own, network(method, x + own["prompt.B"] @ own["prompt.A"], features=True))


def linear_probe(own: Tensors, method: Method, x: torch.Tensor) -> torch.Tensor:
    """A new head by SGD; its batches are the features, which test_frozen.py holds against the network."""
    return head(own, x)


def fine_tuning(own: Tensors, method: Method, x: torch.Tensor) -> torch.Tensor:
    """AnanyaKumar/transfer_learning: all of the network and its new head; BatchNorm in eval, as LP-FT has it."""
    prefix = "backbone.model."
    weights = {name.removeprefix(prefix): value for name, value in own.items() if name.startswith(prefix)}
    return head(own, network(method, x, True, weights))


def framed(own: Tensors, x: torch.Tensor, hole: int) -> torch.Tensor:
    """sigmoid(delta) outside a square of that side in the middle."""
    side = own["prompt.delta"].shape[-1]
    mask = torch.ones(side, side, dtype=torch.float64)
    first = (side - hole + 1) // 2
    mask[first : first + hole, first : first + hole] = 0
    return x + torch.sigmoid(own["prompt.delta"]) * mask


def padded(x: torch.Tensor, side: int) -> torch.Tensor:
    rest = side - x.shape[-1]
    return F.pad(x, ((rest + 1) // 2, rest // 2, (rest + 1) // 2, rest // 2))


def ilm_vp(own: Tensors, method: Method, x: torch.Tensor) -> torch.Tensor:
    """OPTML-Group/ILM-VP: the small image, zeros around it, sigmoid(delta) on those; source logits, picked."""
    seen = framed(own, padded(x, method.backbone.image_size), x.shape[-1])
    return network(method, seen, features=False)[:, method.mapping.index]


def evp(own: Tensors, method: Method, x: torch.Tensor) -> torch.Tensor:
    """UCSC-VLAA/EVP: zeros around the small image, and free values added to those; a head as in every method."""
    side, inner = method.backbone.image_size, x.shape[-1]
    first = (side - inner + 1) // 2
    beside = torch.ones(side, dtype=torch.bool)
    beside[first : first + inner] = False
    return head(own, network(method, padded(x, side) + own["prompt.delta"] * (beside[:, None] | beside), features=True))


def autovp(own: Tensors, method: Method, x: torch.Tensor) -> torch.Tensor:
    """IBM/AutoVP: the padded image scaled about its centre, bilinear; the frame around what it then takes; a layer."""
    side, scale = method.backbone.image_size, own["prompt.scale"]
    canvas = padded(x, side)
    middle = (side - 1) / 2
    at = (torch.arange(side, dtype=torch.float64) - middle) / scale + middle
    low = at.detach().floor().long()

    def along(image: torch.Tensor) -> torch.Tensor:
        """The last dimension, taken from where each pixel lay before; zeros beyond it."""
        total = torch.zeros_like(image)
        for place in (low, low + 1):
            inside = ((place >= 0) & (place < side)).double()
            total = total + image[..., place.clamp(0, side - 1)] * ((1 - (at - place).abs()) * inside)
        return total

    scaled = along(along(canvas).transpose(2, 3)).transpose(2, 3)
    hole = min(int(x.shape[-1] * scale.detach()), side)
    return head(own, network(method, framed(own, scaled, hole), features=False))


def acavp(own: Tensors, method: Method, x: torch.Tensor) -> torch.Tensor:
    """s-enmt/ACAVP with kornia 0.8: the image moved about its corner, multiplied, and a prompt where nothing is of it.

    Values before tanh and sigmoid are stored there; here they are the start's, by its `safe_logit`, plus what we store.
    """
    side = x.shape[-1]
    scale, (angle, shear, shift) = own["prompt.scale"], (own[f"prompt.{name}"] for name in ("angle", "shear", "shift"))
    scale = torch.sigmoid(torch.logit(torch.tensor(0.73, dtype=torch.float64)) + scale)
    angle, (hx, hy) = 0.1 * torch.tanh(angle), torch.tan(0.1 * torch.tanh(shear))
    one, none = torch.ones(()).double(), torch.zeros(()).double()

    def matrix(*values: torch.Tensor) -> torch.Tensor:
        return torch.stack([*values, none, none, one]).view(3, 3)

    rotation = matrix(torch.cos(angle), torch.sin(angle), none, -torch.sin(angle), torch.cos(angle), none)
    scaling = matrix(scale[0], none, none, none, scale[1], none)
    shearing = matrix(one, -hx, none, -hy, 1 + hx * hy, none)
    shifting = matrix(one, none, 0.05 * side * torch.tanh(shift[0]), none, one, 0.05 * side * torch.tanh(shift[1]))
    pixels = matrix(one * 2 / (side - 1), none, -one, none, one * 2 / (side - 1), -one)  # to [-1, 1]
    back = torch.linalg.inv(pixels @ shifting @ rotation @ scaling @ shearing @ torch.linalg.inv(pixels))
    middles = (2 * torch.arange(side, dtype=torch.float64) + 1) / side - 1
    places = torch.stack([middles.expand(side, side), middles[:, None].expand(side, side), one.expand(side, side)])
    column, row = ((torch.einsum("ij,jyx->iyx", back, places)[:2] + 1) * side - 1) / 2

    def taken(image: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(image)
        for i in (row.detach().floor(), row.detach().floor() + 1):
            for j in (column.detach().floor(), column.detach().floor() + 1):
                inside = ((i >= 0) & (i < side) & (j >= 0) & (j < side)).double()
                share = (1 - (row - i).abs()) * (1 - (column - j).abs()) * inside
                total = total + share * image[..., i.clamp(0, side - 1).long(), j.clamp(0, side - 1).long()]
        return total

    seen = taken(x) * 6 * torch.sigmoid(torch.logit(torch.tensor(1 / 6, dtype=torch.float64)) + own["prompt.gain"])
    empty = (taken(torch.ones_like(x[:1, :1])) == 0).double()[0]
    return head(own, network(method, seen + empty * own["prompt.padding"], features=True))


def norm(x: torch.Tensor, w: Tensors, name: str) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)


def layer(x: torch.Tensor, keys: torch.Tensor, w: Tensors, heads: int = 3) -> torch.Tensor:
    """A pre-norm block on tokens x, which attend to `keys`: attention and MLP by their formulas."""

    def part(of: torch.Tensor, place: int) -> torch.Tensor:
        weight, bias = w["attn.qkv.weight"].chunk(3)[place], w["attn.qkv.bias"].chunk(3)[place]
        return (norm(of, w, "norm1") @ weight.T + bias).unflatten(2, (heads, -1)).transpose(1, 2)

    query, key, value = part(x, 0), part(keys, 1), part(keys, 2)
    shares = (query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])).softmax(-1)
    x = x + (shares @ value).transpose(1, 2).flatten(2) @ w["attn.proj.weight"].T + w["attn.proj.bias"]
    inner = norm(x, w, "norm2") @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
    return x + 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2))) @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]


def transformer(method: Method, x: torch.Tensor) -> tuple[torch.Tensor, list[Tensors], Tensors]:
    """The tokens that the first block takes, the weights of each block, and all of them; in float64."""
    model = method.backbone.model
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    x = (x - method.backbone.mean.double()) / method.backbone.std.double()
    patches = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), patches], 1) + w["pos_embed"]
    names = [f"blocks.{i}." for i in range(len(model.blocks))]
    return x, [{k.removeprefix(n): v for k, v in w.items() if k.startswith(n)} for n in names], w


def vpt(own: Tensors, method: Method, x: torch.Tensor) -> torch.Tensor:
    """KMnP/vpt, deep: after the class token, in place of the layer before's."""
    x, blocks, w = transformer(method, x)
    patches = x[:, 1:]
    for tokens, weights in zip(own["tokens"], blocks, strict=True):
        x = torch.cat([x[:, :1], tokens.expand(len(x), -1, -1), patches], 1)
        x = layer(x, x, weights)
        patches = x[:, 1 + len(tokens) :]
    return head(own, norm(x, w, "norm")[:, 0])


def vqt(own: Tensors, method: Method, x: torch.Tensor) -> torch.Tensor:
    """andytu28/VQT: queries go through a layer before its tokens, lend no key, and leave; all parts of length 1."""
    x, blocks, w = transformer(method, x)
    answers = []
    for queries, weights in zip(own["tokens"], blocks, strict=True):
        together = layer(torch.cat([queries.expand(len(x), -1, -1), x], 1), x, weights)
        answers.append(together[:, : len(queries)].flatten(1))
        x = together[:, len(queries) :]
    parts = [norm(x, w, "norm")[:, 0], *answers]
    return head(own, torch.cat([part / part.norm(dim=1, keepdim=True) for part in parts], 1))


class ByHand:
    """SGD with momentum or Adam, both with L2 decay, by their formulas."""

    def __init__(self, name: str, lr: float, decay: float) -> None:
        self.name, self.lr, self.decay, self.steps = name, lr, decay, 0
        self.first: Tensors = {}
        self.second: Tensors = {}

    def step(self, own: Tensors, gradients: Tensors) -> None:
        self.steps += 1
        for name, value in own.items():
            g = gradients[name] + self.decay * value.detach()
            m, v = self.first.get(name, torch.zeros_like(g)), self.second.get(name, torch.zeros_like(g))
            if self.name == "sgd":
                self.first[name] = m = 0.9 * m + g
                change = m
            else:
                self.first[name], self.second[name] = m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                change = m / (1 - 0.9**self.steps) / ((v / (1 - 0.999**self.steps)).sqrt() + 1e-8)
            value.data -= self.lr * change


def several(own: Tensors, method: Method, x: torch.Tensor) -> torch.Tensor:
    """IBM/AutoVP's frequency mapping of two source classes a class: the mean of their logits."""
    logits = network(method, x + own["prompt.B"] @ own["prompt.A"], features=False)
    return torch.stack([logits[:, places].mean(1) for places in method.mapping.index.tolist()], 1)


PUBLISHED: dict[str, tuple[Logits, str, float, float, dict[str, Any]]] = {
    "lorvp": (lorvp, "sgd", 0.02, 1e-4, {}),
    "lorvp, several": (several, "sgd", 0.5, 0.0, {}),
    "linear_probe": (linear_probe, "sgd", 0.5, 1e-4, {}),
    "fine_tuning": (fine_tuning, "sgd", 0.1, 0.0, {"head": {"kind": "lp"}}),
    "ilm_vp": (ilm_vp, "adam", 0.01, 0.0, {"prompt": {"inner": 112}}),
    "autovp": (autovp, "adam", 0.001, 0.0, {"prompt": {"inner": 112, "scale": 1.3}}),
    "evp": (evp, "sgd", 0.5, 0.0, {"prompt": {"normalize_grad": False}}),
    "acavp": (acavp, "sgd", 1.0, 0.0, {}),
    "vpt": (vpt, "sgd", 0.5, 1e-3, {}),
    "vqt": (vqt, "adam", 0.05, 1e-3, {}),
}
"""Definition, optimizer, learning rate, weight decay, and what else a trial of it has."""


@pytest.mark.parametrize("method", PUBLISHED)
def test_forward_and_steps_are_the_published_ones(method):
    logits, name, lr, decay, changes = PUBLISHED[method]
    optimizer = {"name": name, "lr": lr, "weight_decay": decay}
    changes = changes | {"prompt": changes.get("prompt", {}) | {"optimizer": name}}
    wanted = config(method, speed=PLAIN, schedule={"name": "constant"}, optimizer=optimizer, **changes)
    common = loaded(wanted)
    if common.backbone.model.__class__.__name__ == "VisionTransformer":  # as they come, its layers hardly say a thing
        with torch.no_grad():
            for parameter in common.backbone.parameters():
                parameter.normal_(std=0.15)
    trial = Trainer(wanted, common)
    trial.start_epoch(1)
    trained = {id(p) for group in trial.stage.groups.values() for p in group}
    ours = {key: value for key, value in trial.stage.method.named_parameters() if id(value) in trained}
    own = {key: value.detach().double().requires_grad_() for key, value in ours.items()}
    start = {key: value.detach().clone() for key, value in own.items()}
    by_hand = ByHand(name, lr, decay)
    steps = 0
    for images, labels, whole in trial.batches():
        said = logits(own, trial.stage.method, images.double())
        torch.testing.assert_close(trial.stage.model(images).double(), said, rtol=1e-4, atol=1e-4)
        gradients = torch.autograd.grad(F.cross_entropy(said, labels), list(own.values()))
        by_hand.step(own, dict(zip(own, gradients, strict=True)))
        trial.train_step(images, labels, whole)
        steps += 1
        for key, value in own.items():
            moved = (value - start[key]).norm()
            rounding = 6e-8 * value.norm()  # of a weight in fp32
            assert (ours[key] - value).norm() <= 2e-3 * moved + steps * rounding, (key, steps)
    assert steps == 3
    for group, parameters in trial.stage.groups.items():
        keys = [key for key, value in ours.items() if any(value is p for p in parameters)]
        assert any(not torch.equal(own[key], start[key]) for key in keys), group
