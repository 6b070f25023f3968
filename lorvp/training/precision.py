"""The precision that a trial trains in, where its config leaves it to the machine (`precision: auto`).

A GPU is taken by its word. A CPU that has 16-bit instructions may be slower with them: on an Intel Xeon with
avx512_bf16 a step of ViT-Tiny ran at 17 images/s in bf16 and at 28 in fp32. So a few steps are timed there.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch.nn import functional as F

from lorvp import methods
from lorvp.config import TrialConfig
from lorvp.features.cache import compute_once, key
from lorvp.models.backbone import Backbone, resolve_precision
from lorvp.utils import device, files

STEPS = 3
"""Timed in each precision, after one that is not."""
IMAGES = 32
"""Of a batch, at most."""
CLASSES = 10


def choose(config: TrialConfig, where: torch.device, kept: str | None = None) -> str:
    """Choose fp32, bf16 or fp16 for a trial: `kept`, which others of its sweep train in, wherever `where` has that.

    What was measured is kept in the cache, by machine, model and way of training. Raises UserError for a precision that
    a config asks for and the GPU does not have.
    """
    by_flag = resolve_precision(config.precision, where)
    if config.precision != "auto":
        return by_flag
    if kept is not None:
        return by_flag if where.type == "cuda" and kept == "bf16" else kept
    if where.type != "cpu" or by_flag == "fp32":
        return by_flag
    machine = (device.name(where), torch.__version__, torch.get_num_threads())
    model = (_plain(config).backbone.model_dump_json(), config.method, config.head.kind, _batch(config))
    path = files.cache_folder() / f"precision-{key(machine, model)}"
    with compute_once(path) as missing:
        if missing:
            seconds = _seconds(config, (by_flag, "fp32"))
            with files.replacing(path) as temporary:
                temporary.write_text(f"{min(seconds, key=seconds.__getitem__)}\n")
    return path.read_text().strip()


def file(trials: Path, config: TrialConfig) -> Path:
    """Name the file beside a sweep's trials that says what those with this backbone train in."""
    return trials.parent / f"precision-{key(config.backbone.model_dump_json())}"


def _plain(config: TrialConfig) -> TrialConfig:
    """Leave weights out, which don't change how long a step takes."""
    plain = {"pretrained": False, "checkpoint": None, "zero_shot": None}
    return config.model_copy(update={"backbone": config.backbone.model_copy(update=plain)})


def _batch(config: TrialConfig) -> int:
    return min(config.batch_size, IMAGES)


def _seconds(config: TrialConfig, precisions: tuple[str, ...]) -> dict[str, float]:
    """Time a step in each precision, in turns: the quickest of each, in seconds."""
    config = _plain(config)
    made = {}
    for precision in precisions:
        backbone = Backbone(config.backbone, precision, config.backbone_speed)
        made[precision] = methods.make(config, backbone, min(CLASSES, backbone.source_classes or CLASSES))
    size = backbone.image_size
    images = torch.zeros(_batch(config), 3, size, size, dtype=torch.uint8)
    labels = torch.zeros(len(images), dtype=torch.int64)
    seconds = {precision: float("inf") for precision in precisions}
    for step in range(1 + STEPS):
        for precision, method in made.items():
            start = time.perf_counter()
            with torch.set_grad_enabled(not method.trains_head_only):
                loss = F.cross_entropy(method(images), labels)
            if loss.requires_grad:
                loss.backward()
            if step:
                seconds[precision] = min(seconds[precision], time.perf_counter() - start)
    return seconds
