"""Save a tuned prompt as a bundle folder and load it as a module; `lorvp.bundle.format` describes the folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lorvp import methods
from lorvp.bundle.card import card, selection
from lorvp.bundle.format import (
    CARD,
    DESCRIPTION,
    EXAMPLE,
    FORMAT_VERSION,
    PICTURE,
    PROMPTED,
    TENSORS,
    check_tensors,
    describe,
    digest,
)
from lorvp.config import TrialConfig
from lorvp.errors import UserError
from lorvp.methods.base import Method
from lorvp.models.backbone import Backbone
from lorvp.utils.files import replacing

if TYPE_CHECKING:
    from lorvp.result import EpochResult

SINGULAR_VALUES = 16


def save(
    folder: Path,
    method: Method,
    config: TrialConfig,
    precision: str,
    class_names: Sequence[str],
    best_epoch: int,
    results: Sequence[EpochResult],
    example: torch.Tensor,
) -> None:
    """Write `method`, which holds the best epoch's state, to `folder`, in place of what lies there.

    `example` (1, 3, H, W) uint8 is an image to show the prompt on.
    """
    backbone = method.backbone
    best, last = results[best_epoch - 1], results[-1]
    with replacing(folder) as temporary:
        temporary.mkdir()
        save_file(method.trainable_state_dict(), temporary / TENSORS)
        description = {
            "format_version": FORMAT_VERSION,
            "config": config.model_dump(mode="json"),
            "trial": config.content_hash(),
            "sha256": digest(temporary / TENSORS),
            "metrics": {
                "selection": selection(config),
                "epoch": best_epoch,
                "epochs_trained": last.epoch,
                "val_top1": best.val_top1,
                "val_top5": best.val_top5,
                "val_loss": best.val_loss,
                "test_top1": best.test_top1 if config.select == "test_best_epoch" else last.test_top1,
                "test_top5": best.test_top5 if config.select == "test_best_epoch" else last.test_top5,
            },
            "class_names": list(class_names),
            "source": {
                "digest": backbone.digest,
                "image_size": method.side,  # of the images to give it
                "mean": backbone.mean.flatten().tolist(),
                "std": backbone.std.flatten().tolist(),
                "classes": backbone.source_classes,
                "precision": precision,
                "licence": backbone.licence,
                "hub_id": backbone.hub_id,
            },
            "versions": {"torch": torch.__version__, "timm": timm.__version__},
        }
        with torch.inference_mode():
            example = example.to(backbone.mean.device)
            to_picture(backbone.prepare(example)[0]).save(temporary / EXAMPLE)
            pattern = method.input_prompt()
            if pattern is not None:
                description["prompt"] = spectrum(pattern)
                picture(pattern).save(temporary / PICTURE)
                to_picture((method.transform_input(method.prepare(example)) + pattern)[0]).save(temporary / PROMPTED)
        (temporary / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
        (temporary / CARD).write_text(card(description))


def spectrum(pattern: torch.Tensor) -> dict[str, Any]:
    """Return a prompt's (3, L, L) largest absolute value, and each colour's largest singular values, falling."""
    values = torch.linalg.svdvals(pattern.detach().float().cpu())[:, :SINGULAR_VALUES]
    return {"largest": pattern.abs().max().item(), "singular_values": values.tolist()}


def picture(pattern: torch.Tensor) -> Image.Image:
    """Draw a prompt (3, L, L) as an image: grey where it adds nothing, and its largest value at full contrast."""
    values = pattern.detach().float().cpu()
    return to_picture(0.5 + values / (2 * values.abs().max().clamp(min=1e-12)))


def to_picture(values: torch.Tensor) -> Image.Image:
    """Convert values (3, H, W) in [0, 1] to a picture of about 224 pixels; values outside are clamped."""
    pixels = (values.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    enlarge = max(1, 224 // pixels.shape[0])
    return Image.fromarray(np.kron(pixels, np.ones((enlarge, enlarge, 1), dtype=np.uint8)))


def load(folder: str | Path, device: str | torch.device = "cpu", module: str | Path | None = None) -> Method:
    """Load the tuned model of a bundle, in eval mode.

    The model takes images of any size, (N, 3, H, W) uint8 or float in [0, 1], and returns downstream logits (N,
    classes) float32, computed in the trial's precision. Its `class_names` name the classes in the order of the logits.
    `module` is the Python file that registers the backbone's architecture if timm does not have it. That file is run,
    so the caller must name it: the bundle's own mention of it is not followed.

    Raises UserError for a folder that is no bundle, for files that are missing, altered or don't fit together, and for
    backbone weights other than those the bundle was tuned on.
    """
    folder = Path(folder)
    description = describe(folder)
    check_tensors(folder, description)
    config = TrialConfig.model_validate(description["config"])
    source, class_names = description["source"], description["class_names"]
    file = None if module is None else Path(module).expanduser().absolute()
    required_module = config.backbone.module
    if required_module is not None and file is None and not timm.is_model(config.backbone.name):
        raise UserError(
            f"{folder}: its backbone {config.backbone.name} is registered by a file of its own, "
            f"{required_module.name}: "
            "it runs if you name it (--module FILE)"
        )
    try:
        tuned = load_file(folder / TENSORS)
        backbone_config = config.backbone.model_copy(update={"module": file})
        backbone = Backbone(backbone_config, source["precision"], config.backbone_speed, device)
        method = methods.make(config, backbone, len(class_names))
        method.load_trainable_state_dict(tuned)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}: a bundle whose parts are missing or don't fit together ({reason})") from None
    if backbone.digest != source["digest"]:
        raise UserError(f"{folder}: tuned on other weights of {config.backbone.name} than these")
    method.class_names = class_names
    return method.to(device).eval()
