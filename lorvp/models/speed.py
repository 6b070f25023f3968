"""Speed up a frozen backbone's forward pass, and the gradient with respect to its input.

Each optimization gives the plain backbone's outputs within the rounding of the precision. This is checked on a probe
whenever a backbone is made, and an optimization that fails is left out. Each can be switched off (`trial.speed`);
docs/benchmarks.md has what each saves.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.layers.norm_act import BatchNormAct2d
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode

from lorvp.config import SpeedConfig

Forward = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Backward = Callable[[Any, torch.Tensor], tuple[torch.Tensor, ...]]
Undo = Callable[[], None]
"""Change a model back to what it was."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Parameters of `mallopt`, from malloc.h."""
TOLERANCE, GRADIENT_TOLERANCE = 1e-2, 5e-2
"""Largest relative difference of a probe's outputs and of its gradient. Sums in another order and TF32 cause some, and
for the gradient also a unit that is just at its kink."""


def keep_memory(on: bool) -> None:
    """Make glibc's allocator keep freed memory, or return large blocks to the system at once, which is its default.

    Each step frees its activations and allocates them again, and the system clears every page each time. The setting
    applies to the whole process; without glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(M_MMAP_MAX, 0 if on else 1 << 16)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1 if on else 64 << 20)
    mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the value that glibc reaches by itself once blocks of that size were freed


class SplitConv(nn.Module):
    """Compute a first layer by linearity: conv(images + prompt) = conv(images) + conv(prompt), zero padding included.

    The prompt's part is computed once for the batch. `prompt` (3, L, L), divided by the deviation but without the mean
    subtracted, is set for one forward pass at a time.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.prompt: torch.Tensor | None = None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map normalised images (N, 3, L, L) to the layer's output (N, C, H, W)."""
        output: torch.Tensor = self.conv(images)
        if self.prompt is None:
            return output
        prompt_output: torch.Tensor = self.conv(self.prompt[None])
        if self.conv.bias is not None:
            prompt_output = prompt_output - self.conv.bias[:, None, None]
        total: torch.Tensor = BroadcastAdd.apply(output, prompt_output.to(output.dtype))
        return total


class BroadcastAdd(torch.autograd.Function):
    """Add (N, C, H, W) + (1, C, H, W), with a faster gradient of the second operand.

    That gradient is the sum over the batch, taken in the order of memory. With channels last torch's own sum writes to
    a tensor with channels first, which takes 20 times as long on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """Return the sum, (N, C, H, W)."""
        return images + prompt

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return the gradients of both operands; None for images that need none."""
        images = grad if ctx.needs_input_grad[0] else None  # needed by methods that learn the images' scale
        if grad.is_contiguous(memory_format=torch.channels_last):
            return images, grad.movedim(1, -1).sum(0, keepdim=True).movedim(-1, 1)
        return images, grad.sum(0, keepdim=True)


class ClassTokenBlock(nn.Module):
    """Run a ViT's last block for the class token only, as the head reads nothing else: (N, tokens, C) to (N, 1, C)."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block: Any = block  # timm does not type its parts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (N, tokens, C) to the class token (N, 1, C)."""
        block, attention = self.block, self.block.attn
        width, heads = attention.attn_dim, (attention.num_heads, attention.head_dim)
        y = block.norm1(x)
        weights = attention.qkv.weight.split([width, 2 * width])
        biases = (None, None) if attention.qkv.bias is None else attention.qkv.bias.split([width, 2 * width])
        query = torch.unflatten(F.linear(y[:, :1], weights[0], biases[0]), 2, heads).transpose(1, 2)
        key_value = torch.unflatten(F.linear(y, weights[1], biases[1]), 2, (2, *heads))
        key, value = key_value.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(attention.q_norm(query), attention.k_norm(key), value)
        attended = attention.proj(attention.norm(attended.transpose(1, 2).flatten(2)))
        x = x[:, :1] + block.ls1(attended)
        output: torch.Tensor = x + block.ls2(block.mlp(block.norm2(x)))
        return output


_custom_fwd: Callable[[Forward], Forward] = torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
_custom_bwd: Callable[[Backward], Backward] = torch.amp.custom_bwd(device_type="cpu")


class AttentionByProducts(torch.autograd.Function):
    """Compute softmax(Q K' / sqrt(d)) V for (N, heads, tokens, d) each, in bf16 with float32 scores.

    The scores are float32 as in torch's own attention, whose backward takes three times as long on a CPU. The images
    are processed in chunks whose scores fit in the processor's cache.
    """

    CACHE_BYTES = 2 << 20
    """Largest size of a chunk's scores."""

    @staticmethod
    @_custom_fwd  # which also switches autocast off within
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return the attention's output, (N, heads, tokens, d) bf16."""
        _, heads, tokens, width = query.shape
        ctx.images = max(1, AttentionByProducts.CACHE_BYTES // (4 * heads * tokens * key.shape[2]))
        ctx.scale = width**-0.5
        weights, outputs = [], []
        for q, k, v in zip(*(torch.split(t, ctx.images) for t in (query, key, value)), strict=True):
            scores = (q.float() * ctx.scale) @ k.float().transpose(2, 3)
            weights.append(scores.softmax(3).to(v.dtype))
            outputs.append(weights[-1] @ v)
        ctx.save_for_backward(query, key, value, *weights)
        return torch.cat(outputs)

    @staticmethod
    @_custom_bwd
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the gradients of query, key and value."""
        query, key, value, *weights = ctx.saved_tensors
        parts = zip(*(torch.split(t, ctx.images) for t in (query, key, value, grad)), weights, strict=True)
        grads = []
        for q, k, v, g, w in parts:
            score_grad = torch._softmax_backward_data(g @ v.transpose(2, 3), w, 3, w.dtype) * ctx.scale
            grads.append((score_grad @ k, score_grad.transpose(2, 3) @ q, w.transpose(2, 3) @ g))
        return tuple(torch.cat(chunks) for chunks in zip(*grads, strict=True))


class FasterAttention(TorchFunctionMode):
    """Use AttentionByProducts within the block for attention that is given query, key and value only."""

    OPTIONS = ("dropout_p", "is_causal", "scale", "enable_gqa")
    used = False
    """Whether any attention has used it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            plain = kwargs.get("attn_mask") is None and not any(map(kwargs.get, self.OPTIONS))
            if plain and len(args) == 3 and args[0].dim() == 4:
                self.used = True
                return AttentionByProducts.apply(*args)
        return func(*args, **kwargs)


def attention_matches(model: Any, image_size: int) -> bool:
    """Tell whether, on a probe in bf16 on the CPU, FasterAttention is about as exact as torch's own attention.

    Its error against fp32 may be twice that of torch's own attention, plus TOLERANCE.
    """
    with torch.autocast("cpu", torch.bfloat16), FasterAttention() as faster:
        try:
            ours = probe_outputs(model, image_size)
        except Exception:  # for example where all images share one image's keys
            ours = []
    if not faster.used:
        return True
    with torch.autocast("cpu", torch.bfloat16):
        reference = probe_outputs(model, image_size)
    exact = probe_outputs(model, image_size)
    same = bool(ours) and all(
        (ours_i - exact_i).norm() <= 2 * (reference_i - exact_i).norm() + TOLERANCE * exact_i.norm()
        for ours_i, reference_i, exact_i in zip(ours, reference, exact, strict=True)
    )
    if not same:
        print("speed.attention_by_products is left out: with it the backbone would not say the same", flush=True)
    return same


def accelerate(model: Any, config: SpeedConfig, image_size: int) -> SplitConv | None:
    """Make a frozen timm model in eval mode faster, in place, and return its first layer if it was split.

    The model's outputs on a probe and the prompt's gradient are compared with those of the plain model. An optimization
    that changes them is left out, and the log says so.
    """
    keys = [key for key in OPTIMIZATIONS if getattr(config, key)]
    if not keys:
        return None
    try:
        plain = probe_outputs(model, image_size)
    except Exception as error:  # some models can't be run like this, so their outputs can't be compared
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        print(f"speed: {', '.join(keys)} left out: the backbone can't be tried: {reason}", flush=True)
        return None
    undos = [_try_optimization(model, key, image_size) for key in keys]
    if None in undos or not _matches_plain(model, image_size, plain):
        for undo in reversed(undos):
            if undo is not None:
                undo()
        for key in keys:
            undo = _try_optimization(model, key, image_size)
            if undo is None or not _matches_plain(model, image_size, plain):
                if undo is not None:
                    undo()
                print(f"speed.{key} is left out: with it the backbone would not say the same", flush=True)
    return _find_split_conv(model)


def _try_optimization(model: Any, key: str, image_size: int) -> Undo | None:
    """Apply an optimization and return its undo. Return None, and change nothing, if it can't be applied."""
    try:
        return OPTIMIZATIONS[key](model, image_size)
    except Exception:  # not every model has the structure that an optimization expects
        return None


def probe_outputs(model: Any, image_size: int) -> list[torch.Tensor]:
    """Run a model on two random images with a prompt; return features, logits if it has any, and the prompt's gradient.

    Shapes are (2, d), (2, source classes) and (3, L, L).
    """
    random = torch.Generator().manual_seed(0)
    like = next(model.parameters())
    draw = partial(torch.randn, generator=random)
    images, prompt = draw(2, 3, image_size, image_size), 0.1 * draw(3, image_size, image_size)
    split_conv = _find_split_conv(model)
    with torch.enable_grad():
        prompt = prompt.to(like).requires_grad_()
        x = images.to(like)
        try:
            if split_conv is None:
                x = x + prompt
            else:
                split_conv.prompt = prompt
            hidden = model.forward_features(x)
            outputs: list[torch.Tensor] = [model.forward_head(hidden, pre_logits=True)]
            outputs += [model.forward_head(hidden)] if model.num_classes else []
        finally:
            if split_conv is not None:
                split_conv.prompt = None
        # weighted by random numbers, because after a norm the plain sum would be the same for all images
        total = sum(((out * draw(out.shape).to(out)) / out.detach().norm().clamp(min=1e-12)).sum() for out in outputs)
        (grad,) = torch.autograd.grad([torch.as_tensor(total)], [prompt])
    return [*(output.detach() for output in outputs), grad]


def _matches_plain(model: Any, image_size: int, plain: list[torch.Tensor]) -> bool:
    try:
        outputs = probe_outputs(model, image_size)
    except Exception:  # for example where the first layer does not see the image
        return False
    limits = [TOLERANCE] * (len(plain) - 1) + [GRADIENT_TOLERANCE]
    pairs = zip(outputs, plain, limits, strict=True)
    return all((ours - reference).norm() <= limit * reference.norm() for ours, reference, limit in pairs)


def _find_split_conv(model: nn.Module) -> SplitConv | None:
    """Find the layer of a model that was split."""
    return next((module for module in model.modules() if isinstance(module, SplitConv)), None)


def split_first_layer(model: Any, image_size: int) -> Undo:
    """Replace the first convolution with a SplitConv, where it pads with zeros; return the undo."""
    name = getattr(model, "pretrained_cfg", {}).get("first_conv")
    if not isinstance(name, str):
        return _no_undo
    first = model.get_submodule(name)
    if not isinstance(first, nn.Conv2d) or first.padding_mode != "zeros":
        return _no_undo
    model.set_submodule(name, SplitConv(first))
    return lambda: model.set_submodule(name, first)


def class_token_only(model: Any, image_size: int) -> Undo:
    """Replace a ViT's last block with a ClassTokenBlock, where the head reads the class token only; return the undo."""
    if not _reads_class_token_only(model):
        return _no_undo
    last = model.blocks[-1]
    model.blocks[-1] = ClassTokenBlock(last)

    def undo() -> None:
        model.blocks[-1] = last

    return undo


def channels_last(model: Any, image_size: int) -> Undo:
    """Lay out a convolutional model's weights with channels last; return the undo."""
    if not is_convolutional(model):
        return _no_undo
    model.to(memory_format=torch.channels_last)
    return lambda: model.to(memory_format=torch.contiguous_format)


def _no_undo() -> None:
    pass


def is_convolutional(model: nn.Module) -> bool:
    """Tell whether more than half of the parameters belong to convolutions."""
    convolutions = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))
    return 2 * convolutions > sum(p.numel() for p in model.parameters())


def fold_batchnorm(model: Any, image_size: int) -> Undo:
    """Fold each BatchNorm, which is linear in eval mode, into the convolution before it; return the undo.

    A forward pass of one image shows which BatchNorm follows which convolution. If a convolution's output is also used
    elsewhere the model's output changes, so the caller must compare and undo. A BatchNorm without running statistics
    normalises by the batch in eval mode too, and stays.
    """
    conv_outputs: dict[int, tuple[torch.Tensor, nn.Conv2d]] = {}  # the tensor is kept, so that its id is not reused
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def note_output(conv: nn.Conv2d, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        conv_outputs[id(output)] = (output, conv)

    def note_input(norm: nn.BatchNorm2d, inputs: tuple[torch.Tensor]) -> None:
        if id(inputs[0]) in conv_outputs:
            pairs.append((conv_outputs[id(inputs[0])][1], norm))

    norms = {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None
    }
    if not norms:
        return _no_undo
    hooks = [norm.register_forward_pre_hook(note_input) for norm in norms]
    hooks += [m.register_forward_hook(note_output) for m in model.modules() if isinstance(m, nn.Conv2d)]
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, image_size, image_size).to(next(model.parameters())))
    finally:
        for hook in hooks:
            hook.remove()
    unique_pairs = [(c, n) for c, n in pairs if sum(c is conv or n is norm for conv, norm in pairs) == 1]
    plain = [(conv, conv.weight, conv.bias) for conv, _ in unique_pairs]
    for conv, norm in unique_pairs:
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None  # true of all in `norms`
        assert variance is not None
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, mean, variance, norm.eps, norm.weight, norm.bias
        )
        rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
        model.set_submodule(norms[norm], rest)

    def undo() -> None:
        for (conv, weight, bias), (_, norm) in zip(plain, unique_pairs, strict=True):
            conv.weight, conv.bias = weight, bias
            model.set_submodule(norms[norm], norm)

    return undo


def _reads_class_token_only(model: nn.Module) -> bool:
    if type(model) is not VisionTransformer or model.global_pool != "token" or model.attn_pool is not None:
        return False
    last = model.blocks[-1]
    return type(last) is Block and type(last.attn) is Attention and last.attn.gate is None


OPTIMIZATIONS: dict[str, Callable[[Any, int], Undo]] = {
    "fold_batchnorm": fold_batchnorm,
    "class_token_only": class_token_only,
    "channels_last": channels_last,
    "split_first_layer": split_first_layer,
}
"""Optimizations by their key in `speed`. Each changes a model in place and returns its undo."""
