"""A model's weights from a file of someone's: found under whatever prefix they have, and fitted by name and shape."""

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
"""In the names of weights that are better than those beside them, of which they are the average."""
SHOWN = 3


def load(build: Callable[..., Any], path: Path, classes: int | None) -> Any:
    """The model that `build` gives, with the weights of `path`.

    `build` takes timm's `pretrained` and `pretrained_cfg_overlay`. One prefix is taken off all names: that which leaves
    the most of the model's own. A checkpoint without a head makes a model without a classifier, one with a head for
    another number of classes a model of so many; unless `classes` says how many there must be. What timm does to
    weights that others published, by their names, is tried where they don't fit as they are. Raises UserError for what
    can't be read or does not fit.
    """
    tensors = read(path)
    model = build(pretrained=False)
    prefix = _prefix(tensors, model, path)
    own = _without(tensors, prefix)
    misfits = fit(model, own, classes)
    if not misfits:
        if prefix:
            print(f"weights: those under {prefix} in {path}", flush=True)
        return model
    parts = prefix.split(".")
    above = [".".join(parts[:i]) + "." * (i > 0) for i in range(len(parts) - 1, -1, -1)]
    for each in above:
        # timm lets pass what is missing where the classes are not those that it expects
        for overlay in ({}, {"num_classes": 0}) if classes is None else ({"num_classes": classes},):
            try:
                found = build(pretrained=True, pretrained_cfg_overlay=overlay | {"state_dict": _without(tensors, each)})
            except Exception:  # whatever timm's functions raise for names that are not those they expect
                continue
            found.pretrained_cfg.pop("state_dict")
            return found
    some = "; ".join(misfits[:SHOWN]) + (f"; and {len(misfits) - SHOWN} more" if len(misfits) > SHOWN else "")
    raise UserError(f"backbone.checkpoint: {path} does not fit: {some}")


def read(path: Path) -> Tensors:
    """All tensors in a file of safetensors or of torch.save, by dotted name. Raises UserError."""
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
    """Puts tensors into a model in place, and its classifier's size to theirs; or nothing, and what does not fit."""
    heads = classifiers(model)
    own = model.state_dict()
    ours = {name: tensor for name, tensor in tensors.items() if not _under(name, heads)}
    theirs = {name: tensor for name, tensor in tensors.items() if _under(name, heads)}
    misfits = []
    for name, tensor in own.items():
        if _under(name, heads) or (name not in ours and name.endswith("num_batches_tracked")):
            continue
        if name not in ours:
            misfits.append(f"{name} is missing")
        elif ours[name].shape != tensor.shape:
            misfits.append(f"{name} is {list(ours[name].shape)}, and should be {list(tensor.shape)}")
    left = [name for name in ours if name not in own]
    misfits += [f"{name} has no place in the model" for name in left if hasattr(model, name.partition(".")[0])]
    there = _classes(own, theirs, heads)
    if classes is not None and classes != there:
        for name in [name for name in own if _under(name, heads)]:
            found = list(theirs[name].shape) if name in theirs else "missing"
            misfits.append(f"{name} is {found}, and should be {list(own[name].shape)}")
    if misfits:
        return misfits
    if there != model.num_classes:
        model.reset_classifier(there)
        print(f"weights: a head of {there} classes" if there else "weights: without a head of classes", flush=True)
    left += list(theirs) if not there else []
    if left:
        print(
            f"weights: left out, as they are not the model's: {', '.join(left[:SHOWN])}{' ...' * (len(left) > SHOWN)}"
        )
    model.load_state_dict(ours | (theirs if there else {}), strict=False)
    return []


def classifiers(model: Any) -> list[str]:
    """The names of the layers that give a model's logits."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier")
    if names is None:
        given = model.get_classifier()
        layers = given if isinstance(given, tuple | list) else [given]
        return [name for name, module in model.named_modules() if any(module is layer for layer in layers)]
    return [names] if isinstance(names, str) else list(names)


def _classes(own: Any, theirs: Tensors, heads: list[str]) -> int:
    """Of the tensors of a head like the model's the number of classes; 0 where they are none, or of another head."""
    wanted = {name: tensor for name, tensor in own.items() if _under(name, heads)}
    if not wanted or theirs.keys() != wanted.keys():
        return 0
    alike = all(theirs[name].shape[1:] == tensor.shape[1:] for name, tensor in wanted.items())
    counts = {tensor.shape[0] if tensor.ndim else 0 for tensor in theirs.values()}
    return counts.pop() if alike and len(counts) == 1 else 0


def _under(name: str, heads: list[str]) -> bool:
    return any(name.startswith(f"{head}.") for head in heads)


def _flatten(value: Any, prefix: str, into: Tensors) -> None:
    if isinstance(value, torch.Tensor):
        into[prefix.removesuffix(".")] = value
    elif isinstance(value, dict):
        for key, each in value.items():
            _flatten(each, f"{prefix}{key}.", into)


def _without(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _prefix(tensors: Tensors, model: nn.Module, path: Path) -> str:
    """That of the names under which the most of the model's tensors are; of averages, where both are there."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found: dict[str, int] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        for i in range(len(parts)):
            own, prefix = ".".join(parts[i:]), "".join(f"{part}." for part in parts[:i])
            if own in shapes:
                found[prefix] = found.get(prefix, 0) + 1 + (shapes[own] == tensor.shape)
    if not found:
        some = ", ".join(list(tensors)[:SHOWN])
        raise UserError(
            f"backbone.checkpoint: {path} does not fit: none of its {len(tensors)} names is the model's: {some}"
        )
    most = max(found.values())
    best = [prefix for prefix, count in found.items() if count == most]
    return next((prefix for prefix in best if any(word in prefix for word in AVERAGES)), best[0])
