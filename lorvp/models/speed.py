"""Ways to a frozen backbone's output, and to the gradient of what is added to its input, in less time.

Each gives what the plain backbone gives, within the rounding of the precision. That is tried on a probe whenever a
backbone is made, and a way that does not is left out. Each can be switched off (`trial.speed`); docs/benchmarks.md has
what it was measured to save.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode

from lorvp.config import SpeedConfig

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Of malloc.h."""
TOLERANCE, OF_GRADIENT = 1e-2, 5e-2
"""What a probe's output and gradient may differ by, as a share of their length: by sums in another order, TF32, and a
gradient also by a unit that is just at its kink."""


def keep_memory(on: bool) -> None:
    """Whether glibc's allocator keeps what is freed, or gives large blocks back at once, as it does by itself.

    A step frees its activations and asks for them again, and the system clears each page of them every time. It holds
    for the process; without glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(M_MMAP_MAX, 0 if on else 1 << 16)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1 if on else 64 << 20)
    mallopt(M_MMAP_THRESHOLD, 32 << 20)  # what it comes to by itself, once blocks of that size were freed


class SplitConv(nn.Module):
    """A first layer, by linearity: conv(images + prompt) = conv(images) + conv(prompt), padding by zeros included.

    The prompt's part is computed once for the batch. `prompt` (3, L, L), normalised without the mean, is set for one
    forward at a time.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.prompt: torch.Tensor | None = None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        seen = self.conv(images)
        if self.prompt is None:
            return seen
        part = self.conv(self.prompt[None])
        if self.conv.bias is not None:
            part = part - self.conv.bias[:, None, None]
        return AddedToAll.apply(seen, part.to(seen.dtype))


class AddedToAll(torch.autograd.Function):
    """(N, C, H, W) + (1, C, H, W), with its own way to the second one's gradient.

    That is the gradients' sum over the batch, in the order in which they lie in memory: with the channels last, torch's
    own sum goes to a tensor whose channels come first, which takes a CPU 20 times as long.
    """

    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        return images + prompt

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        images = grad if ctx.needs_input_grad[0] else None  # where a method learns how they are placed
        if grad.is_contiguous(memory_format=torch.channels_last):
            return images, grad.movedim(1, -1).sum(0, keepdim=True).movedim(-1, 1)
        return images, grad.sum(0, keepdim=True)


class ClassTokenBlock(nn.Module):
    """The last block of a ViT, for the class token alone: nothing else of its output is read.

    (N, tokens, C) to (N, 1, C).
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block: Any = block  # timm does not say what its parts are

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        block, attention = self.block, self.block.attn
        width, heads = attention.attn_dim, (attention.num_heads, attention.head_dim)
        y = block.norm1(x)
        weights = attention.qkv.weight.split([width, 2 * width])
        biases = (None, None) if attention.qkv.bias is None else attention.qkv.bias.split([width, 2 * width])
        query = F.linear(y[:, :1], weights[0], biases[0]).unflatten(2, heads).transpose(1, 2)
        key, value = F.linear(y, weights[1], biases[1]).unflatten(2, (2, *heads)).permute(2, 0, 3, 1, 4).unbind(0)
        seen = F.scaled_dot_product_attention(attention.q_norm(query), attention.k_norm(key), value)
        seen = attention.proj(attention.norm(seen.transpose(1, 2).flatten(2)))
        x = x[:, :1] + block.ls1(seen)
        return x + block.ls2(block.mlp(block.norm2(x)))


class AttentionByProducts(torch.autograd.Function):
    """softmax(Q K' / sqrt(d)) V of (N, heads, tokens, d) each, in bf16 but for the scores.

    These are float32, as in torch's own attention, whose way back takes a CPU three times as long. So many images are
    taken at a time as leave their scores in the processor's cache.
    """

    CACHED = 2 << 20

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)  # which also leaves autocast out of it
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        _, heads, tokens, width = query.shape
        ctx.images = max(1, AttentionByProducts.CACHED // (4 * heads * tokens * key.shape[2]))
        ctx.scale = width**-0.5
        weights, seen = [], []
        for q, k, v in zip(*(t.split(ctx.images) for t in (query, key, value)), strict=True):
            scores = (q.float() * ctx.scale) @ k.float().transpose(2, 3)
            weights.append(scores.softmax(3).to(v.dtype))
            seen.append(weights[-1] @ v)
        ctx.save_for_backward(query, key, value, *weights)
        return torch.cat(seen)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, *weights = ctx.saved_tensors
        parts = zip(*(t.split(ctx.images) for t in (query, key, value, grad)), weights, strict=True)
        grads = []
        for q, k, v, g, w in parts:
            of_scores = torch._softmax_backward_data(g @ v.transpose(2, 3), w, 3, w.dtype) * ctx.scale
            grads.append((of_scores @ k, of_scores.transpose(2, 3) @ q, w.transpose(2, 3) @ g))
        return tuple(torch.cat(each) for each in zip(*grads, strict=True))


class FasterAttention(TorchFunctionMode):
    """Within it, a model's attention goes by AttentionByProducts, where nothing but query, key and value is given."""

    OPTIONS = ("dropout_p", "is_causal", "scale", "enable_gqa")
    used = False
    """Whether any has gone so."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            plain = kwargs.get("attn_mask") is None and not any(map(kwargs.get, self.OPTIONS))
            if plain and len(args) == 3 and args[0].dim() == 4:
                self.used = True
                return AttentionByProducts.apply(*args)
        return func(*args, **kwargs)


def attention_says_the_same(model: Any, image_size: int) -> bool:
    """Whether by FasterAttention a model on the CPU errs no more in bf16 than by torch's own, on a probe."""
    with torch.autocast("cpu", torch.bfloat16), FasterAttention() as faster:
        try:
            ours = said(model, image_size)
        except Exception:  # as where one image's keys are all images'
            ours = []
    if not faster.used:
        return True
    with torch.autocast("cpu", torch.bfloat16):
        theirs = said(model, image_size)
    exact = said(model, image_size)
    same = bool(ours) and all(
        (each - wanted).norm() <= 2 * (other - wanted).norm() + TOLERANCE * wanted.norm()
        for each, other, wanted in zip(ours, theirs, exact, strict=True)
    )
    if not same:
        print("speed.attention_by_products is left out: with it the backbone would not say the same", flush=True)
    return same


Undo = Callable[[], None]


def accelerate(model: Any, config: SpeedConfig, image_size: int) -> SplitConv | None:
    """Makes a frozen timm model in eval mode faster, in place; its first layer, if that was split.

    What the model says of a probe, and the prompt's gradient, are compared with those of the plain model: a way by
    which they differ is left out, and the log says so.
    """
    ways = [key for key in WAYS if getattr(config, key)]
    if not ways:
        return None
    try:
        plain = said(model, image_size)
    except Exception as error:  # models are many; what this one says can't be compared
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        print(f"speed: {', '.join(ways)} left out: the backbone can't be tried: {reason}", flush=True)
        return None
    undo = [_tried(model, key, image_size) for key in ways]
    if None in undo or not _says(model, image_size, plain):
        for each in reversed(undo):
            if each is not None:
                each()
        for key in ways:
            each = _tried(model, key, image_size)
            if each is None or not _says(model, image_size, plain):
                if each is not None:
                    each()
                print(f"speed.{key} is left out: with it the backbone would not say the same", flush=True)
    return _split(model)


def _tried(model: Any, key: str, image_size: int) -> Undo | None:
    """Goes a way; how to go back. None, and nothing done, where it can't be gone with this model."""
    try:
        return WAYS[key](model, image_size)
    except Exception:  # not all are what a way takes them for
        return None


def said(model: Any, image_size: int) -> list[torch.Tensor]:
    """What a model says of two images with a prompt on them: features, logits if it has any, the prompt's gradient."""
    random = torch.Generator().manual_seed(0)
    like = next(model.parameters())
    draw = partial(torch.randn, generator=random)
    images, prompt = draw(2, 3, image_size, image_size), 0.1 * draw(3, image_size, image_size)
    first = _split(model)
    with torch.enable_grad():
        added = prompt.to(like).requires_grad_()
        x = images.to(like)
        try:
            if first is None:
                x = x + added
            else:
                first.prompt = added
            seen = model.forward_features(x)
            given = [model.forward_head(seen, pre_logits=True)]
            given += [model.forward_head(seen)] if model.num_classes else []
        finally:
            if first is not None:
                first.prompt = None
        # by each number in another direction: after a norm their sum would be the same for all images
        total = sum((each * draw(each.shape).to(each) / each.detach().norm().clamp(min=1e-12)).sum() for each in given)
        (grad,) = torch.autograd.grad(total, added)
    return [*(each.detach() for each in given), grad]


def _says(model: Any, image_size: int, plain: list[torch.Tensor]) -> bool:
    try:
        found = said(model, image_size)
    except Exception:  # as where the first layer does not see the image
        return False
    limits = [TOLERANCE] * (len(plain) - 1) + [OF_GRADIENT]
    pairs = zip(found, plain, limits, strict=True)
    return all((ours - theirs).norm() <= limit * theirs.norm() for ours, theirs, limit in pairs)


def _split(model: nn.Module) -> SplitConv | None:
    """The layer of a model that was split."""
    return next((module for module in model.modules() if isinstance(module, SplitConv)), None)


def split_first_layer(model: Any, image_size: int) -> Undo:
    name = getattr(model, "pretrained_cfg", {}).get("first_conv")
    if not isinstance(name, str):
        return _nothing
    first = model.get_submodule(name)
    if not isinstance(first, nn.Conv2d) or first.padding_mode != "zeros":
        return _nothing
    model.set_submodule(name, SplitConv(first))
    return lambda: model.set_submodule(name, first)


def class_token_only(model: Any, image_size: int) -> Undo:
    if not _reads_class_token_only(model):
        return _nothing
    last = model.blocks[-1]
    model.blocks[-1] = ClassTokenBlock(last)

    def undo() -> None:
        model.blocks[-1] = last

    return undo


def channels_last(model: Any, image_size: int) -> Undo:
    if not is_convolutional(model):
        return _nothing
    model.to(memory_format=torch.channels_last)
    return lambda: model.to(memory_format=torch.contiguous_format)


def _nothing() -> None:
    pass


def is_convolutional(model: nn.Module) -> bool:
    """Whether most of the weights are convolutions'."""
    convolutions = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))
    return 2 * convolutions > sum(p.numel() for p in model.parameters())


def fold_batchnorm(model: Any, image_size: int) -> Undo:
    """Puts each BatchNorm, which in eval mode is linear, into the convolution before it.

    Which follows which is seen in a forward of one image. Where an output goes elsewhere, too, the model would be
    another: who calls it compares, and goes back. A BatchNorm without running statistics goes by the batch in eval
    mode, too, and stays.
    """
    made: dict[int, tuple[torch.Tensor, nn.Conv2d]] = {}  # with the tensor itself, so that no other takes its place
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def note_output(conv: nn.Conv2d, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        made[id(output)] = (output, conv)

    def note_input(norm: nn.BatchNorm2d, inputs: tuple[torch.Tensor]) -> None:
        if id(inputs[0]) in made:
            pairs.append((made[id(inputs[0])][1], norm))

    norms = {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None
    }
    if not norms:
        return _nothing
    hooks = [norm.register_forward_pre_hook(note_input) for norm in norms]
    hooks += [m.register_forward_hook(note_output) for m in model.modules() if isinstance(m, nn.Conv2d)]
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, image_size, image_size).to(next(model.parameters())))
    finally:
        for hook in hooks:
            hook.remove()
    once = [(c, n) for c, n in pairs if sum(c is conv or n is norm for conv, norm in pairs) == 1]
    plain = [(conv, conv.weight, conv.bias) for conv, _ in once]
    for conv, norm in once:
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None  # as of all in `norms`
        assert variance is not None
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, mean, variance, norm.eps, norm.weight, norm.bias
        )
        rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
        model.set_submodule(norms[norm], rest)

    def undo() -> None:
        for (conv, weight, bias), (_, norm) in zip(plain, once, strict=True):
            conv.weight, conv.bias = weight, bias
            model.set_submodule(norms[norm], norm)

    return undo


def _reads_class_token_only(model: nn.Module) -> bool:
    if type(model) is not VisionTransformer or model.global_pool != "token" or model.attn_pool is not None:
        return False
    last = model.blocks[-1]
    return type(last) is Block and type(last.attn) is Attention and last.attn.gate is None


WAYS: dict[str, Callable[[Any, int], Undo]] = {
    "fold_batchnorm": fold_batchnorm,
    "class_token_only": class_token_only,
    "channels_last": channels_last,
    "split_first_layer": split_first_layer,
}
"""By the key of `speed`: each changes a model in place, and gives what changes it back."""
