"""Whether a sweep's trials fit the GPU, as --dry-run says it."""

from __future__ import annotations

from pydantic import ValidationError

from cluster import profile as profiles
from lorvp.config import TrialConfig
from lorvp.data.store import read_manifest
from lorvp.errors import UserError
from sweeps.spec.model import Scalar, Spec, active

PHASES = {"batch_size": "training", "eval_batch_size": "evaluation"}
"""What a trial does, by the batch size that decides what it takes."""
GROWING = (*PHASES, "adapter.count")
"""Axes of which the largest value takes the most."""
USABLE = 0.9
"""Of a GPU's memory; the rest is left to CUDA, its libraries' workspaces and the allocator's gaps."""


def memory_line(spec: Spec) -> str:
    """Say what the largest trial of the space takes on a GPU, and whether the profile's has as much."""
    profile = profiles.load(spec.cluster)
    gpu_bytes = USABLE * 1e9 * (profile.gpu_memory_gb or 0)
    try:
        trials = [(config, point, _peak_bytes(config, profile.gpus, gpu_bytes)) for config, point in _largest(spec)]
        config, point, peak_bytes = max(trials, key=lambda trial: max(trial[2].values()))
        too_large = [key for key in PHASES if peak_bytes[key] > gpu_bytes > 0]
        smallest = config.model_copy(update=dict.fromkeys(PHASES, profile.gpus))
        smallest_bytes = _peak_bytes(smallest, profile.gpus, gpu_bytes) if too_large else {}
    except Exception as error:  # timm's models are many, and some do what fake tensors can't
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return f"peak GPU memory: can't be predicted: {reason[0]}"

    key = max(peak_bytes, key=lambda key: peak_bytes[key])
    where = "".join(f", {name} {value}" for name, value in point.items() if name not in PHASES)
    precision = "16-bit" if config.precision == "auto" else config.precision
    over = f" over {profile.gpus} GPUs" if profile.gpus > 1 else ""
    line = f"peak GPU memory: about {_format_gb(peak_bytes[key])} in {PHASES[key]} at batch {getattr(config, key)}"
    line += f"{over}{where} ({precision})"
    if not profile.gpu_memory_gb:
        return line
    gpu = f"the {profile.gpu_memory_gb:g} GB of profile {spec.cluster}"
    if not too_large:
        return f"{line}, fits {gpu}"
    suggestions = []
    for key in too_large:
        # Each moment of a step takes a + b * batch, so their maximum lies below the line from one image to this batch.
        per_image = (peak_bytes[key] - smallest_bytes[key]) / max(getattr(config, key) - profile.gpus, 1)
        fitting = (
            int((gpu_bytes - smallest_bytes[key]) / per_image) + profile.gpus if gpu_bytes > smallest_bytes[key] else 0
        )
        suggestions.append(f"{key} {fitting // 8 * 8 or fitting} would" if fitting else f"no {key} would")
    return f"{line}, does NOT fit {gpu} ({1 - USABLE:.0%} of it is left to CUDA); {', '.join(suggestions)}"


def _format_gb(size: float) -> str:
    return f"{size / 1e9:.{1 if size > 1e9 else 2}f} GB"


def _largest(spec: Spec) -> list[tuple[TrialConfig, dict[str, Scalar]]]:
    """Configs of which one takes the most, each with the values that set it apart; of GROWING axes the largest."""
    axes = spec.ordered_axes()
    others = ("method", "prompt.kind", "adapter.kind", "precision", "adapter.deep")
    decide = [name for name in axes if name in (*GROWING, *others) or name.startswith("backbone.")]
    conditions = {condition for name in decide for condition in axes[name].conditions()}
    points: list[dict[str, Scalar]] = [{}]
    for name, axis in axes.items():
        values = [max(axis.examples())] if name in GROWING else axis.examples()
        if name not in decide and name not in conditions:
            values = values[:1]
        grown = []
        for point in points:
            grown += [point | {name: value} for value in values] if active(axis, point) else [point]
        points = grown
    largest = []
    for point in points:
        try:
            config = spec.trial_config(point)
        except ValidationError:  # values that don't go together: such a trial fails before it takes anything
            continue
        largest.append((config, {name: point[name] for name in decide if name in point}))
    return largest


def _peak_bytes(config: TrialConfig, gpus: int, gpu_bytes: float) -> dict[str, float]:
    """Predict the bytes a trial takes on each GPU, by phase. Raises UserError for a backbone that can't be built."""
    from lorvp.estimate.memory import predict  # here, for torch takes seconds to import

    classes, dataset = dataset_on_gpu(config, gpu_bytes)
    prediction = predict(config, classes, gpus)
    return {
        "batch_size": prediction.training * 2**20 + dataset,
        "eval_batch_size": prediction.evaluation * 2**20 + dataset,
    }


def dataset_on_gpu(config: TrialConfig, gpu_bytes: float) -> tuple[int | None, int]:
    """Classes, None where they aren't known, and the bytes of the images that will be kept on the GPU."""
    from lorvp.data.loader import DEVICE_FRACTION

    if config.dataset.name != "store" or config.dataset.root is None:
        return None, 0
    try:
        manifest = read_manifest(config.dataset.root)
    except UserError:  # a plan is shown before the data are there, too
        return None, 0
    rows = sum(split.index.rows for split in manifest.splits.values())
    size = rows * 3 * (manifest.description.image_size or 0) ** 2
    return len(manifest.description.class_names), size if size <= DEVICE_FRACTION * gpu_bytes else 0
