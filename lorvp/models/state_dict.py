"""Load a model's weights from a checkpoint file: find their prefix, and fit them by name and shape."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from lorvp.errors import UserError

Tensors = dict[str, torch.Tensor]
AVERAGES = ("ema", "teacher")
"""Parts of the prefixes of averaged weights, which are preferred to the weights that they average."""
SHOWN = 3


def load(build: Callable[..., Any], path: Path, classes: int | None) -> Any:
    """Build a model and load the weights of `path` into it.

    `build` takes timm's `pretrained` and `pretrained_cfg_overlay`. The prefix under which most of the model's tensors
    lie is removed from all names. Unless `classes` fixes the number of classes, it comes from the checkpoint: without a
    head the model has no classifier. If the weights don't fit as they are, timm's conversions of published weights are
    tried. Raises UserError for a file that can't be read or does not fit.
    """
    tensors = read(path)
    model = build(pretrained=False)
    prefix = _best_prefix(tensors, model, path)
    misfits = fit(model, _strip_prefix(tensors, prefix), classes)
    if not misfits:
        if prefix:
            print(f"weights: those under {prefix} in {path}", flush=True)
        return model
    parts = prefix.split(".")
    parent_prefixes = [".".join(parts[:i]) + "." * (i > 0) for i in range(len(parts) - 1, -1, -1)]
    for parent_prefix in parent_prefixes:
        # timm accepts missing head tensors if the number of classes is not the one that it expects
        for overlay in ({}, {"num_classes": 0}) if classes is None else ({"num_classes": classes},):
            try:
                state_dict = _strip_prefix(tensors, parent_prefix)
                converted = build(pretrained=True, pretrained_cfg_overlay=overlay | {"state_dict": state_dict})
            except Exception:  # timm's functions may raise anything for names that they don't expect
                continue
            converted.pretrained_cfg.pop("state_dict")
            return converted
    listing = "; ".join(misfits[:SHOWN]) + (f"; and {len(misfits) - SHOWN} more" if len(misfits) > SHOWN else "")
    raise UserError(f"backbone.checkpoint: {path} does not fit: {listing}")


def read(path: Path) -> Tensors:
    """Read all tensors of a safetensors or torch.save file by dotted name. Raises UserError for any other file."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # which training scripts save beside the weights
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = "it is not of torch.save, or holds other Python objects than tensors: save its state_dict alone"
        raise UserError(f"backbone.checkpoint: {path} can't be read: {reason}") from error
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"backbone.checkpoint: {path} can't be read: {reason}") from error
    tensors: Tensors = {}
    _flatten(content, "", tensors)
    if not tensors:
        raise UserError(f"backbone.checkpoint: {path} has no tensors by name, as a state_dict has")
    return tensors


def fit(model: Any, tensors: Tensors, classes: int | None) -> list[str]:
    """Load tensors into a model in place and resize its classifier to theirs.

    Return the list of misfits, one line each. If there are any, the model is left unchanged.
    """
    heads = classifiers(model)
    own = model.state_dict()
    body_tensors = {name: tensor for name, tensor in tensors.items() if not _is_in_head(name, heads)}
    head_tensors = {name: tensor for name, tensor in tensors.items() if _is_in_head(name, heads)}
    misfits = []
    for name, tensor in own.items():
        if _is_in_head(name, heads) or (name not in body_tensors and name.endswith("num_batches_tracked")):
            continue
        if name not in body_tensors:
            misfits.append(f"{name} is missing")
        elif body_tensors[name].shape != tensor.shape:
            misfits.append(f"{name} is {list(body_tensors[name].shape)}, and should be {list(tensor.shape)}")
    left = [name for name in body_tensors if name not in own]
    misfits += [f"{name} has no place in the model" for name in left if hasattr(model, name.partition(".")[0])]
    checkpoint_classes = _head_classes(own, head_tensors, heads)
    if classes is not None and classes != checkpoint_classes:
        for name in [name for name in own if _is_in_head(name, heads)]:
            shape = list(head_tensors[name].shape) if name in head_tensors else "missing"
            misfits.append(f"{name} is {shape}, and should be {list(own[name].shape)}")
    if misfits:
        return misfits
    if checkpoint_classes != model.num_classes:
        model.reset_classifier(checkpoint_classes)
        head = f"a head of {checkpoint_classes} classes" if checkpoint_classes else "without a head of classes"
        print(f"weights: {head}", flush=True)
    left += list(head_tensors) if not checkpoint_classes else []
    if left:
        print(
            f"weights: left out, as they are not the model's: {', '.join(left[:SHOWN])}{' ...' * (len(left) > SHOWN)}"
        )
    model.load_state_dict(body_tensors | (head_tensors if checkpoint_classes else {}), strict=False)
    return []


def classifiers(model: Any) -> list[str]:
    """Return the names of the layers that compute a model's logits."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier")
    if names is None:
        classifier = model.get_classifier()
        layers = classifier if isinstance(classifier, tuple | list) else [classifier]
        return [name for name, module in model.named_modules() if any(module is layer for layer in layers)]
    return [names] if isinstance(names, str) else list(names)


def _head_classes(own: Any, head_tensors: Tensors, heads: list[str]) -> int:
    """Return the number of classes of a checkpoint's head; 0 if it has none, or one unlike the model's."""
    own_head = {name: tensor for name, tensor in own.items() if _is_in_head(name, heads)}
    if not own_head or head_tensors.keys() != own_head.keys():
        return 0
    alike = all(head_tensors[name].shape[1:] == tensor.shape[1:] for name, tensor in own_head.items())
    counts = {tensor.shape[0] if tensor.ndim else 0 for tensor in head_tensors.values()}
    return counts.pop() if alike and len(counts) == 1 else 0


def _is_in_head(name: str, heads: list[str]) -> bool:
    return any(name.startswith(f"{head}.") for head in heads)


def _flatten(value: Any, prefix: str, into: Tensors) -> None:
    if isinstance(value, torch.Tensor):
        into[prefix.removesuffix(".")] = value
    elif isinstance(value, dict):
        for key, item in value.items():
            _flatten(item, f"{prefix}{key}.", into)


def _strip_prefix(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _best_prefix(tensors: Tensors, model: nn.Module, path: Path) -> str:
    """Return the prefix under which most of the model's tensors lie; among equals, one of averaged weights."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    counts: dict[str, int] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        for i in range(len(parts)):
            own, prefix = ".".join(parts[i:]), "".join(f"{part}." for part in parts[:i])
            if own in shapes:
                counts[prefix] = counts.get(prefix, 0) + 1 + (shapes[own] == tensor.shape)
    if not counts:
        listing = ", ".join(list(tensors)[:SHOWN])
        raise UserError(
            f"backbone.checkpoint: {path} does not fit: none of its {len(tensors)} names is the model's: {listing}"
        )
    most = max(counts.values())
    best = [prefix for prefix, count in counts.items() if count == most]
    return next((prefix for prefix in best if any(word in prefix for word in AVERAGES)), best[0])
