"""Ways to a frozen backbone's output, and to the gradient of what is added to its input, in less time.

Each gives what the plain backbone gives, within the rounding of the precision, and can be switched off
(`trial.speed`). docs/benchmarks.md has what each was measured to save.
"""

from __future__ import annotations

import ctypes
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

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            plain = kwargs.get("attn_mask") is None and not any(map(kwargs.get, self.OPTIONS))
            if plain and len(args) == 3 and args[0].dim() == 4:
                return AttentionByProducts.apply(*args)
        return func(*args, **kwargs)


def accelerate(model: Any, config: SpeedConfig, image_size: int) -> SplitConv | None:
    """Makes a frozen timm model in eval mode faster, in place; its first layer, if that was split."""
    if config.fold_batchnorm:
        fold_batchnorm(model, image_size)
    if config.class_token_only and _reads_class_token_only(model):
        model.blocks[-1] = ClassTokenBlock(model.blocks[-1])
    if config.channels_last and is_convolutional(model):
        model.to(memory_format=torch.channels_last)
    name = model.pretrained_cfg.get("first_conv")
    if not config.split_first_layer or not isinstance(name, str):
        return None
    first = model.get_submodule(name)
    if not isinstance(first, nn.Conv2d) or first.padding_mode != "zeros":
        return None
    split = SplitConv(first)
    model.set_submodule(name, split)
    return split


def is_convolutional(model: nn.Module) -> bool:
    """Whether most of the weights are convolutions'."""
    convolutions = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))
    return 2 * convolutions > sum(p.numel() for p in model.parameters())


def fold_batchnorm(model: nn.Module, image_size: int) -> int:
    """Puts each BatchNorm, which in eval mode is linear, into the convolution before it; how many there were.

    Which follows which is seen in a forward of one image. Where an output goes elsewhere, too, the model would be
    another: then it is left as it was. A BatchNorm without running statistics goes by the batch in eval mode, too, and
    stays.
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
        return 0
    hooks = [norm.register_forward_pre_hook(note_input) for norm in norms]
    hooks += [m.register_forward_hook(note_output) for m in model.modules() if isinstance(m, nn.Conv2d)]
    probe = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    probe = probe.to(next(model.parameters()).dtype)
    with torch.no_grad():
        before = model(probe)
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
        if torch.allclose(model(probe), before, rtol=1e-3, atol=1e-3 * before.abs().max().item()):
            return len(once)
    for (conv, weight, bias), (_, norm) in zip(plain, once, strict=True):
        conv.weight, conv.bias = weight, bias
        model.set_submodule(norms[norm], norm)
    return 0


def _reads_class_token_only(model: nn.Module) -> bool:
    if type(model) is not VisionTransformer or model.global_pool != "token" or model.attn_pool is not None:
        return False
    last = model.blocks[-1]
    return type(last) is Block and type(last.attn) is Attention and last.attn.gate is None
