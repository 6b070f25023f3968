"""The trial: `train(config)` adapts a frozen backbone and yields one result per epoch."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from lorvp import bundle, datasets, distributed, pipeline, plugins
from lorvp.backbone import Backbone, resolve_precision
from lorvp.config import OptimizerConfig, ScheduleConfig, TrialConfig
from lorvp.errors import TrialFailed, UserError
from lorvp.files import replacing
from lorvp.methods import Method

CHECKPOINT = "checkpoint.pt"
BUNDLE = "bundle"
TOP_K = 5


@dataclass(frozen=True)
class EpochResult:
    """What one epoch gave. Accuracies in percent, losses in nats, averaged over images."""

    epoch: int
    train_loss: float
    val_loss: float
    val_top1: float
    val_top5: float
    lr: dict[str, float]
    """Learning rate of each parameter group (prompt, head) at the epoch's first step."""
    images_per_second: float
    """Training images, from the file or the memory to the step, validation not counted."""
    peak_memory_mib: float
    """Largest so far: allocated on the GPU, or resident in the process."""
    seconds: float
    time: float
    """Unix time at the end of the epoch."""
    test_loss: float | None = None
    test_top1: float | None = None
    test_top5: float | None = None
    """Read once, in the last epoch's result, with the best epoch's prompt and head; in every result under
    `select: test_best_epoch`, there with that epoch's own."""


@dataclass(frozen=True)
class _Part:
    """An epoch that was begun: how many steps of it were taken, and what they gave."""

    step: int = 0
    total_loss: float = 0.0
    skipped: int = 0
    lr: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Loaded:
    """What trials have in common that share backbone, data and precision (`TrialConfig.shares_with`)."""

    backbone: Backbone
    splits: datasets.Splits
    precision: str


def load(config: TrialConfig) -> Loaded:
    """Builds the backbone on the device and reads the data. Raises UserError where either can't be had."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(config.precision, device)
    backbone = Backbone(config.backbone, precision, config.speed).to(device)
    splits = datasets.load(config.dataset, backbone.image_size)
    return Loaded(backbone, pipeline.kept_on_device(splits, device), precision)


class _Stop(Exception):
    """The search gave up on the trial."""


def train(
    config: TrialConfig,
    folder: Path | None = None,
    resume_from: Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    loaded: Loaded | None = None,
) -> Iterator[EpochResult]:
    """Trains as `config` says and yields each epoch's result.

    With a `folder`, a checkpoint is written there after every epoch, before its result is yielded, and the best
    epoch's bundle at the end. With `resume_from`, a checkpoint of the same config, the epochs in it are yielded as
    they were recorded and training goes on where it was: on one machine the results are, bit for bit, those of a
    trial that was never interrupted. `should_stop` is asked before every batch; once it says so the iterator ends,
    within the batch. A checkpoint is then written between two steps too, and holds the part of the epoch done so far.
    `loaded` saves loading backbone and data again; the results are the same.

    Within a process group (`lorvp.distributed`) its processes train the one trial together: each has its share of every
    batch and yields the results; the first is the one that has a `folder`, and whose `should_stop` counts.

    Raises UserError for input that can't work, and TrialFailed when the loss is no longer a number.
    """
    loaded = loaded or load(config)
    backbone, splits, precision = loaded.backbone, loaded.splits, loaded.precision
    device = backbone.mean.device
    method: Method = plugins.load("methods", config.method)(config, backbone, len(splits.class_names)).to(device)
    groups = method.groups()
    optimizers = {name: make_optimizer(name, parameters, config.optimizer) for name, parameters in groups.items()}
    base_lr = {name: optimizer.param_groups[0]["lr"] for name, optimizer in optimizers.items()}
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    share = distributed.share()
    trained = distributed.averaged(method)
    crops = torch.Generator().manual_seed(config.order_seed)
    steps_per_epoch = math.ceil(len(splits.train) / config.batch_size)

    results: list[EpochResult] = []
    best: dict[str, Any] = {"epoch": 0, "tuned": {}}
    steps_taken = 0  # without those that fp16 skipped
    part: _Part | None = None
    if resume_from is not None:
        state = read_checkpoint(resume_from, config)
        results = [EpochResult(**values) for values in state["results"]]
        best, steps_taken = state["best"], state["steps_taken"]
        part = _Part(**state["part"]) if state["part"] else None
        method.load_tuned(state["tuned"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        scaler.load_state_dict(state["scaler"])
        set_random_states(state["random_states"])
        crops.set_state(state["crops"])
        yield from results

    def watched(images: datasets.Images, size: int) -> pipeline.Batches:
        for batch in pipeline.batches(images, size, None, device, share):
            if distributed.agreed(should_stop):
                raise _Stop
            yield batch

    def evaluate(images: datasets.Images) -> tuple[float, float, float]:
        """Loss, top-1 and top-5 over `images`, summed on the device and read once."""
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        with torch.inference_mode():
            for pixels, labels in watched(images, config.eval_batch_size):
                logits = method(pixels)
                ranked = logits.topk(min(TOP_K, method.classes), dim=1).indices == labels[:, None]
                loss = F.cross_entropy(logits, labels, reduction="sum")
                sums += torch.stack([loss, ranked[:, 0].sum(), ranked.sum()])
        loss, top1, top5 = (distributed.total(sums) / len(images)).tolist()
        return loss, 100 * top1, 100 * top5

    def save(part: _Part | None) -> None:
        if folder is None:
            return
        state = {
            "config_hash": config.content_hash(),
            "results": [asdict(r) for r in results],
            "best": best,
            "steps_taken": steps_taken,
            "part": asdict(part) if part else None,
            "tuned": method.tuned(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
            "scaler": scaler.state_dict(),
            "random_states": random_states(),
            "crops": crops.get_state(),
        }
        with replacing(folder / CHECKPOINT) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)  # given a path, torch would not say that the disk is full

    try:
        for epoch in range(len(results) + 1, config.epochs + 1):
            start = time.perf_counter()
            order = pipeline.epoch_order(len(splits.train), config.order_seed, epoch)
            if part is None:
                method.start_epoch(epoch, lambda: watched(splits.train, config.eval_batch_size))
                part = _Part()
            first_lr = part.lr
            total_loss = torch.zeros((), dtype=torch.float64, device=device)
            if share[0] == 0:
                total_loss += part.total_loss
            skipped = torch.tensor(part.skipped, device=device)
            training_start = time.perf_counter() - part.seconds
            rest = order[part.step * config.batch_size :]
            given = pipeline.batches(splits.train, config.batch_size, rest, device, share)
            for step, (pixels, labels) in enumerate(given, part.step):
                if distributed.agreed(should_stop):
                    seconds = time.perf_counter() - training_start
                    save(_Part(step, distributed.total(total_loss).item(), int(skipped), first_lr, seconds))
                    raise _Stop
                whole = min(config.batch_size, len(order) - step * config.batch_size)
                if config.dataset.crop_flip:
                    pixels = pipeline.crop_and_flip(pixels, backbone.image_size, crops, share, whole)
                factor = lr_factor(
                    config.schedule, steps_taken + step, config.epochs * steps_per_epoch, steps_per_epoch
                )
                loss = F.cross_entropy(trained(pixels), labels, reduction="sum")
                scaler.scale(loss * (share[1] / whole)).backward()  # processes' gradients are averaged, not summed
                finite = torch.ones((), dtype=torch.bool, device=device)
                for name, optimizer in optimizers.items():
                    optimizer.param_groups[0]["lr"] = base_lr[name] * factor
                    scaler.unscale_(optimizer)
                    norm = torch.nn.utils.get_total_norm([p.grad for p in groups[name]])
                    finite &= norm.isfinite()
                    if config.optimizer.clip_grad_norm is not None:
                        torch.nn.utils.clip_grads_with_norm_(groups[name], config.optimizer.clip_grad_norm, norm)
                    scaler.step(optimizer)
                    optimizer.zero_grad()
                scaler.update()
                first_lr = first_lr or {name: base * factor for name, base in base_lr.items()}
                total_loss += loss.detach()
                skipped += ~finite
            seconds_training = time.perf_counter() - training_start
            train_loss = distributed.total(total_loss).item() / len(splits.train)
            if not math.isfinite(train_loss):
                raise TrialFailed(f"train loss is {train_loss} in epoch {epoch}")
            # A step that fp16 skipped did not use up its place in the schedule; known only here, without a
            # transfer in every step, so the schedule falls back at the start of the next epoch.
            steps_taken += steps_per_epoch - (int(skipped) if scaler.is_enabled() else 0)

            val_loss, val_top1, val_top5 = evaluate(splits.val)
            test = None
            if config.select == "test_best_epoch":
                test = evaluate(splits.test)
            score = val_top1 if test is None else test[1]
            best_yet = best
            if not best["epoch"] or score > best["score"]:
                best_yet = {"epoch": epoch, "score": score, "tuned": method.tuned()}
            if config.select == "val" and epoch == config.epochs:
                last = method.tuned()
                method.load_tuned(best_yet["tuned"])
                test = evaluate(splits.test)
                method.load_tuned(last)
            test_loss, test_top1, test_top5 = test or (None, None, None)
            result = EpochResult(
                epoch=epoch,
                train_loss=train_loss,
                val_loss=val_loss,
                val_top1=val_top1,
                val_top5=val_top5,
                lr=first_lr,
                images_per_second=len(splits.train) / seconds_training,
                peak_memory_mib=peak_memory_mib(device),
                seconds=time.perf_counter() - start,
                time=time.time(),
                test_loss=test_loss,
                test_top1=test_top1,
                test_top5=test_top5,
            )
            results.append(result)  # with `best`, and not before: the test set may have been left half-way
            best = best_yet
            part = None
            save(part)
            yield result
    except _Stop:
        pass
    backbone.check_unmoved()
    if folder is not None and results:
        method.load_tuned(best["tuned"])
        bundle.save(folder / BUNDLE, method, config, precision, splits.class_names, best["epoch"], results)


def make_optimizer(name: str, parameters: list[torch.nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of one group, `prompt` or `head`."""
    prompt = name == "prompt"
    options: dict[str, Any] = {
        "lr": config.prompt_lr if prompt else config.head_lr,
        "weight_decay": config.prompt_weight_decay if prompt else config.head_weight_decay,
        "fused": parameters[0].is_cuda,  # fused steps read GradScaler's verdict on the device
    }
    kind = config.prompt_name if prompt else config.name
    if kind == "sgd":
        return torch.optim.SGD(parameters, momentum=config.momentum, **options)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind](parameters, **options)


def lr_factor(schedule: ScheduleConfig, step: int, total: int, steps_per_epoch: int) -> float:
    """Share of the learning rate at `step` (from 0) of `total`: the first warm-up step has a share above 0."""
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / (total - warmup)
    if schedule.name == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if schedule.name == "linear" else 1.0


def read_checkpoint(path: Path, config: TrialConfig) -> dict[str, Any]:
    """The state that `train` wrote. Raises UserError when it is another config's."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["config_hash"] != config.content_hash():
        raise UserError(f"{path}: the checkpoint of trial {state['config_hash']}, not of {config.content_hash()}")
    return state


def random_states() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["cpu"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def peak_memory_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts KiB
