"""A trial while it is trained: what it is made of, an epoch of it, its checkpoint; `loop.py` goes through them."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch.nn import functional as F

from lorvp import methods
from lorvp.bundle import io as bundle
from lorvp.config import HEAD_MAPPINGS, Rung, TrialConfig
from lorvp.data import augment, datasets, loader, shuffle
from lorvp.errors import TrialFailed, UserError
from lorvp.features import cache as feature_cache
from lorvp.features import probe
from lorvp.models.backbone import Backbone
from lorvp.models.speed import keep_memory
from lorvp.optim.galore import state_bytes
from lorvp.optim.optimizers import lr_factor, make_optimizer
from lorvp.result import EpochResult
from lorvp.training import checkpoint, precision
from lorvp.utils import device, distributed
from lorvp.utils.device import MicroBatches, suppress_out_of_memory

BUNDLE = "bundle"
TOP_K = 5
LATER_STAGES_LR = 0.5
"""Share of the learning rate after the first stage, as VQT's public code has it."""


@dataclass(frozen=True)
class Loaded:
    """What trials have in common that share backbone, data and precision (`TrialConfig.shares_with`)."""

    backbone: Backbone
    splits: datasets.Splits
    precision: str

    def where(self) -> str:
        """Say what trials run on and in."""
        on = self.backbone.mean.device
        driver = device.driver(on)
        return ", ".join([device.name(on), *([f"driver {driver}"] if driver else []), self.precision])

    def in_precision(self, precision: str, config: TrialConfig) -> Loaded:
        """Give the same, with the backbone in fp32, bf16 or fp16."""
        if precision == self.precision:
            return self
        return replace(
            self,
            backbone=Backbone(config.backbone, precision, config.backbone_speed, self.backbone.mean.device),
            precision=precision,
        )


def load(config: TrialConfig, kept_precision: str | None = None) -> Loaded:
    """Builds the backbone on the device and reads the data. Raises UserError where either can't be had.

    `kept_precision` is what others of its sweep train in, for `precision: auto`.
    """
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if where.type == "cpu" and config.speed.keep_memory:
        keep_memory(True)
    chosen = precision.choose(config, where, kept_precision)
    backbone = Backbone(config.backbone, chosen, config.backbone_speed, where)
    splits = datasets.load(config.dataset, backbone.image_size)
    return Loaded(backbone, loader.cache_on_device(splits, where), chosen)


class Best(TypedDict):
    """The best of the whole epochs so far; epoch 0 before there is one."""

    epoch: int
    score: float
    """What it was chosen by, in percent: val or test top-1 (`select`)."""
    tuned: dict[str, torch.Tensor]


class Options(TypedDict, total=False):
    """What a trial is trained with besides its config; see `Training`."""

    folder: Path | None
    resume_from: Path | None
    should_stop: Callable[[], bool]


class Stopped(Exception):
    """The search gave up on the trial, or its job has to leave."""


Figures = tuple[float, float, float]
"""Loss in nats, top-1 and top-5 in percent."""


class Training:
    """One trial while it is trained: its method, optimizers and schedule, and what it has given so far.

    With a `folder`, a checkpoint is written there after every epoch, before its result is given out, and the best
    epoch's bundle at the end. With `resume_from`, a checkpoint of the same config, `results` holds the epochs in it as
    they were recorded and training goes on where it was, in the precision that it began in: on one machine the results
    are, bit for bit, those of a trial that was never interrupted. `should_stop` is asked before every batch, in
    training, in an evaluation and in a pass for a label mapping; once it says so the trial leaves within the batch, and
    a checkpoint holds the part of the epoch that is done.

    Raises UserError for input that can't work.
    """

    def __init__(
        self,
        config: TrialConfig,
        loaded: Loaded,
        folder: Path | None = None,
        resume_from: Path | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        state = None if resume_from is None else checkpoint.read(resume_from, config)
        if state is not None:
            loaded = loaded.in_precision(state["precision"], config)
        self.config, self.whole, self.folder, self.should_stop = config, loaded, folder, should_stop
        self.device = loaded.backbone.mean.device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=loaded.precision == "fp16")
        self.rank, self.processes = distributed.rank_and_world_size()
        if config.steps_per_layer and self.processes > 1:
            raise UserError("optimizer.galore.per_layer frees gradients before several GPUs could average them")
        self.steps_per_epoch = math.ceil(len(loaded.splits.train) / config.batch_size)
        """Of those on all images; the learning rate's schedule goes by them."""
        self.micro_batches = MicroBatches(max(config.batch_size, config.eval_batch_size))
        self.results: list[EpochResult] = []
        self.best = Best(epoch=0, score=0.0, tuned={})
        self.steps_taken = 0.0  # without those that fp16 skipped
        self.order: int | None = None
        """Which epoch's order of the data the epoch that was begun takes; None between two epochs."""
        self.next_order = 1
        self.trained_for = 0.0
        """Seconds of the epoch under way, without its validation."""
        self.evaluated: dict[str, tuple[int, torch.Tensor]] = {}
        """Of the epoch under way, by split: how many images are evaluated, and this process's sums of their figures."""
        self.recounted = 0
        """Images that a pass for the next label mapping has counted so far."""
        self._start_counting()
        if state is None:
            self._enter(config.rung(1))
        else:
            self._continue(state)

    def _enter(self, rung: Rung | None, stage: int = 0) -> None:
        """Makes what is trained, at the size and on the images of `rung`, and in that stage of `TrialConfig.stages`."""
        config, backbone, splits = self.config, self.whole.backbone, self.whole.splits
        if rung and rung.image_size:
            smaller = config.backbone.model_copy(update={"image_size": rung.image_size})
            backbone = Backbone(smaller, self.whole.precision, config.backbone_speed, self.device)
        if rung and rung.train_share:
            count = max(1, round(rung.train_share * len(splits.train)))
            _, kept = datasets.stratified_sample(splits.train.labels, count, config.dataset.split_seed)
            splits = replace(splits, train=splits.train.subset(kept))
        self.rung, self.loaded, self.splits = rung, Loaded(backbone, splits, self.whole.precision), splits
        classes = len(splits.class_names)
        self.method = methods.make(config, backbone, classes).to(self.device)
        self.method.micro_batches = self.micro_batches
        self.method.stage = stage
        self.groups = self.method.groups()
        if stage:  # what the first one has trained is frozen
            for group in (group for name, group in self.groups.items() if name != "head"):
                for parameter in group:
                    parameter.requires_grad_(False)
            self.groups = {"head": self.groups["head"]}
        self.optimizers = {
            name: make_optimizer(name, group, config, self.whole.precision) for name, group in self.groups.items()
        }
        share = LATER_STAGES_LR if stage else 1.0
        self.base_lr = {name: share * optimizer.param_groups[0]["lr"] for name, optimizer in self.optimizers.items()}
        self.cached = self.method.reads_frozen and not config.dataset.crop_flip
        """Whether what the backbone says of the images takes their place: nothing before it or in it is trained."""
        self.model = self.method.mapping if self.cached else self.method
        self.trained = distributed.wrap_ddp(self.model)
        self.steps_in_epoch = math.ceil(len(splits.train) / config.batch_size)

    def _climb(self, rung: Rung | None) -> None:
        """Goes on at another rung with what was learned: prompts are interpolated to their new size."""
        before, optimizers = self.method, self.optimizers
        self._enter(rung)
        shapes = {name: tensor.shape for name, tensor in self.method.tuned().items()}
        tuned = {
            name: tensor if tensor.shape == shapes[name] else resized(tensor, shapes[name])
            for name, tensor in before.tuned().items()
        }
        self.method.load_tuned(tuned)
        self.method.counts = before.counts
        if all(tensor.shape == shapes[name] for name, tensor in before.tuned().items()):
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(optimizers[name].state_dict())

    def _next_stage(self) -> None:
        """Goes on with a new head and new optimizers, at the beginning of the schedule."""
        before = self.method
        stage = before.stage + 1
        self._enter(None, stage)
        self.method.start_stage(before)
        self.steps_taken = float(stage * self._steps_in_stage)

    @property
    def _steps_in_stage(self) -> int:
        return self.config.epochs // self.config.stages * self.steps_per_epoch

    @property
    def _whole(self) -> bool:
        """Whether the epoch under way is one that the result may come from."""
        return self.rung is None and self.method.stage == self.config.stages - 1

    @property
    def through(self) -> bool:
        return len(self.results) == self.config.epochs

    # -- an epoch

    def begin(self, order: int | None) -> None:
        """Begins an epoch on that order of the data, or goes on with the one that was begun."""
        self.start = time.perf_counter()
        rung = self.config.rung(len(self.results) + 1)
        if rung != self.rung:
            self._climb(rung)
        if self.order is None and self.config.stage(len(self.results) + 1) != self.method.stage:
            self._next_stage()
        if self.cached and self.splits is self.loaded.splits:
            said = {
                name: self._said(getattr(self.loaded.splits, name), self.method.mapping.reads)
                for name in ("train", "val", "test")
            }
            self.splits = datasets.Splits(**said)
        if self.order is None:
            if not self.results:
                self._start_head()
            self.method.start_epoch(len(self.results) + 1, self._batches, self._said_of_train)
            self.order, self.recounted = order, 0
            self._start_counting()
        self.training_start = time.perf_counter() - self.before

    def _start_counting(self) -> None:
        """Sets to zero what an epoch counts."""
        self.steps_done, self.before = 0, 0.0
        self.first_lr: dict[str, float] = {}
        self.total_loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        """What is left of the epoch: this process's share of images, ready for `step`, of labels, and of how many."""
        number = self._begun()
        order = loader.epoch_order(len(self.splits.train), self.config.order_seed, number)
        size, share = self.config.batch_size, (self.rank, self.processes)
        rest = order[self.steps_done * size :]
        given = loader.batches(self.splits.train, size, rest, self.device, share)
        for start, (pixels, labels) in zip(range(len(order) - len(rest), len(order), size), given, strict=True):
            places = np.arange(start, min(start + size, len(order)))
            if self.config.dataset.crop_flip:
                draws = shuffle.uniform(places[share[0] :: share[1]], 3, self.config.order_seed, number)
                pixels = augment.crop_and_flip(pixels, self.loaded.backbone.image_size, draws)
            yield self.prepare(pixels), labels, len(places)

    @property
    def unsaved(self) -> bool:
        """Whether there is something of an epoch that the last checkpoint does not hold."""
        return self.order is not None or self.recounted > 0

    def _begun(self) -> int:
        """`order`, within an epoch."""
        assert self.order is not None
        return self.order

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """A batch from the data as the trial takes it, prepared once for all that share it where memory allows."""
        if self.cached:
            return images
        with suppress_out_of_memory():
            return self.method.prepare(images)
        return images  # the method prepares the parts that it takes

    def step(self, images: torch.Tensor, labels: torch.Tensor, whole: int) -> None:
        """One step on this process's share of a batch of `whole` images."""
        if distributed.broadcast_flag(self.should_stop):
            self.before = time.perf_counter() - self.training_start
            raise Stopped
        step = self.steps_taken + self.steps_done * self.steps_per_epoch / self.steps_in_epoch
        step -= self.method.stage * self._steps_in_stage
        factor = lr_factor(self.config.schedule, step, self._steps_in_stage, self.steps_per_epoch)
        for name, optimizer in self.optimizers.items():
            optimizer.param_groups[0]["lr"] = self.base_lr[name] * factor
        self.total_loss += self._backward(images, labels, self.processes / whole)
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for name, optimizer in self.optimizers.items():
            self.scaler.unscale_(optimizer)
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.groups[name] if p.grad is not None])
            finite &= norm.isfinite()
            if self.config.optimizer.clip_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self.groups[name], self.config.optimizer.clip_grad_norm, norm)
            self.scaler.step(optimizer)
        self._zero_grad()
        self.scaler.update()
        self.first_lr = self.first_lr or {name: base * factor for name, base in self.base_lr.items()}
        self.skipped += ~finite
        self.steps_done += 1

    def finish(self, val: Figures, packed: int) -> EpochResult:
        """Ends the epoch: in the last one the test set is read, with the best epoch's prompt. `val` are its figures.

        Raises TrialFailed when the loss is no longer a number.
        """
        if self.optimizers:
            train_loss = distributed.all_reduce_sum(self.total_loss).item() / len(self.splits.train)
        else:
            train_loss = self._evaluate("train")[0]
        epoch, order = len(self.results) + 1, self._begun()
        if not math.isfinite(train_loss):
            raise TrialFailed(f"train loss is {train_loss} in epoch {epoch}")
        # A step that fp16 skipped did not use up its place in the schedule; known only here, without a
        # transfer in every step, so the schedule falls back at the start of the next epoch.
        skipped = int(self.skipped) if self.scaler.is_enabled() else 0
        taken = self.steps_per_epoch - skipped * self.steps_per_epoch / self.steps_in_epoch
        val_loss, val_top1, val_top5 = val
        test = None
        if self.config.select == "test_best_epoch":  # val may be the test set
            test = self._evaluate("test") if self.config.dataset.holds_back else val
        score = val_top1 if test is None else test[1]
        best = self.best
        learned_val = self.config.dataset.train_on_val and test is None  # it no longer tells epochs apart
        if self._whole and (not best["epoch"] or learned_val or score > best["score"]):
            best = Best(epoch=epoch, score=score, tuned=self.method.tuned())
        if self.config.select == "val" and self.config.read_test and epoch == self.config.epochs:
            last = self.method.tuned()
            self.method.load_tuned(best["tuned"])
            try:
                test = self._evaluate("test")
            finally:  # a checkpoint of a trial that is stopped here holds what it was trained to
                self.method.load_tuned(last)
        test_loss, test_top1, test_top5 = test or (None, None, None)
        result = EpochResult(
            epoch=epoch,
            train_loss=train_loss,
            val_loss=val_loss,
            val_top1=val_top1,
            val_top5=val_top5,
            lr=self.first_lr,
            images_per_second=len(self.splits.train) / self.trained_for,
            peak_memory_mib=peak_memory_mib(self.device),
            seconds=time.perf_counter() - self.start,
            time=time.time(),
            parameters=self.parameters(),
            optimizer_state_mib=sum(map(state_bytes, self.optimizers.values())) / 2**20,
            order=order,
            packed=packed,
            whole=self._whole,
            device=device.name(self.device),
            driver=device.driver(self.device),
            precision=self.whole.precision,
            test_loss=test_loss,
            test_top1=test_top1,
            test_top5=test_top5,
        )
        self.results.append(result)  # with `best`, and not before: the test set may have been left half-way
        self.best, self.steps_taken = best, self.steps_taken + taken
        self.next_order, self.order, self.evaluated = order + 1, None, {}
        self.save()
        return result

    def parameters(self) -> dict[str, int]:
        """How many numbers of each kind were trained, or fitted."""
        groups = {"head": list(self.method.mapping.parameters())} | self.method.groups()
        return {name: sum(p.numel() for p in group) for name, group in groups.items() if group}

    def close(self) -> None:
        """Leaves the best epoch's bundle in the folder."""
        if not self.config.trains_backbone:
            self.loaded.backbone.check_unmoved()
        if self.folder is None or not self.best["epoch"]:
            return
        self.method.load_tuned(self.best["tuned"])
        bundle.save(
            self.folder / BUNDLE,
            self.method,
            self.config,
            self.loaded.precision,
            self.splits.class_names,
            self.best["epoch"],
            self.results,
            example=self.loaded.splits.val.read([0]),  # self.splits may hold what the backbone says of the images
        )

    # -- its parts

    def _check(self) -> None:
        if distributed.broadcast_flag(self.should_stop):
            raise Stopped

    def _check_alone(self) -> None:
        """Of several processes one computes what is cached, and can't ask the others."""
        if self.processes == 1:
            self._check()

    def _start_head(self) -> None:
        """Puts a fitted head in, where the config asks for one."""
        if self.config.head_init == "random" or self.config.label_mapping not in HEAD_MAPPINGS:
            return
        splits, reads = self.loaded.splits, self.method.mapping.reads
        train, val = (self._read_plain(self._said(images, reads)) for images in (splits.train, splits.val))
        cs = probe.CS if self.method.reads_frozen else probe.CS[::3]  # a start need not be as exact as the control
        whole = train if self.config.dataset.train_on_val else None
        if whole is not None:  # C is chosen without val's images, which are its last ones
            train = train.subset(np.arange(len(train) - len(val)))
        weight, bias = probe.head(train, val, self.config.head_fit, self.device, cs, whole, self._check_alone)
        self.method.start_head(weight, bias)

    def _said(self, images: datasets.Images, output: feature_cache.Output) -> datasets.ArrayImages:
        """From the cache; of several processes one computes it, and the others wait."""
        return feature_cache.get(self.loaded.backbone, images, output, self.config.eval_batch_size, self._check_alone)

    def _read_plain(self, said: datasets.ArrayImages) -> datasets.ArrayImages:
        """`said`, as a fitted head reads it."""
        read = self.method.read_plain(said.pixels)
        return said if read is said.pixels else datasets.ArrayImages(read, said.labels, said.class_names)

    def _said_of_train(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The source class that the backbone takes each of the training images for, and their labels."""
        said = self._said(self.loaded.splits.train, "top")
        return said.pixels.to(self.device), torch.from_numpy(said.labels).to(self.device)

    def _batches(self) -> loader.Batches:
        """A pass over this process's share of the training images."""
        images, size = self.loaded.splits.train, self.config.eval_batch_size
        rest = np.arange(self.recounted, len(images))
        for batch in loader.batches(images, size, rest, self.device, (self.rank, self.processes)):
            self._check()
            yield batch
            self.recounted = min(self.recounted + size, len(images))

    def figures(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(3,) float64: the sum of the losses, and how many have their label first, and among the first five."""

        def of(some: torch.Tensor, their: torch.Tensor) -> torch.Tensor:
            logits = self.model(some)
            ranked = logits.topk(min(TOP_K, self.method.classes), dim=1).indices == their[:, None]
            loss = F.cross_entropy(logits, their, reduction="sum")
            return torch.stack([loss, ranked[:, 0].sum(), ranked.sum()]).double()

        return torch.stack(self.micro_batches.run(of, images, labels)).sum(0)

    def _evaluate(self, split: str) -> Figures:
        found = evaluate([self], split)
        if not found:
            raise Stopped
        return found[self]

    def _backward(self, images: torch.Tensor, labels: torch.Tensor, scale: float) -> torch.Tensor:
        """Adds the gradients of the losses' sum times `scale`, and gives that sum."""

        def of(some: torch.Tensor, their: torch.Tensor) -> torch.Tensor:
            loss = F.cross_entropy(self.trained(some), their, reduction="sum")
            penalty = self.method.penalty()
            whole = loss if penalty is None else loss + len(some) * penalty
            self.scaler.scale(whole * scale).backward()  # processes' gradients are averaged, not summed
            return loss.detach()

        # several processes would wait for gradients that never come; per layer, some weights have made their step
        may_split = self.processes == 1 and not self.config.steps_per_layer
        losses = self.micro_batches.run(of, images, labels, may_split=may_split, undo=self._forget_batch)
        self.method.count(labels)
        return torch.stack(losses).sum(0)

    def _forget_batch(self) -> None:
        self._zero_grad()
        self.method.forget()

    def _zero_grad(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()

    # -- the checkpoint

    def save(self) -> None:
        """Writes the checkpoint: where the trial is, between two batches."""
        total_loss = distributed.all_reduce_sum(self.total_loss).item()
        counts = None if self.method.counts is None else distributed.all_reduce_sum(self.method.counts)
        evaluated = {
            split: (count, distributed.all_reduce_sum(sums).cpu()) for split, (count, sums) in self.evaluated.items()
        }
        recount = None
        if self.method.recounting is not None:
            recount = {"images": self.recounted, "counts": distributed.all_reduce_sum(self.method.recounting)}
        if self.folder is None:
            return
        part = None
        if self.order is not None:
            part = {
                "step": self.steps_done,
                "total_loss": total_loss,
                "skipped": int(self.skipped),
                "lr": self.first_lr,
                "seconds": self.before,
                "order": self.order,
                "evaluated": evaluated,
            }
        state = {
            "config_hash": self.config.content_hash(),
            "results": [asdict(r) for r in self.results],
            "best": self.best,
            "steps_taken": self.steps_taken,
            "next_order": self.next_order,
            "part": part,
            "recount": recount,
            "precision": self.whole.precision,
            "tuned": self.method.tuned(),
            "counts": counts,
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scaler": self.scaler.state_dict(),
            "random_states": checkpoint.random_states(),
        }
        checkpoint.write(self.folder, state)

    def _continue(self, state: dict[str, Any]) -> None:
        self.results = [EpochResult(**values) for values in state["results"]]
        self.best, self.steps_taken, self.next_order = state["best"], state["steps_taken"], state["next_order"]
        part = state["part"]
        epoch = len(self.results) + 1 if part else max(1, len(self.results))
        self._enter(self.config.rung(epoch), self.config.stage(epoch))
        self.method.load_tuned(state["tuned"])
        if state["counts"] is not None:
            self.method.counts = state["counts"].to(self.device) * (self.rank == 0)
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.scaler.load_state_dict(state["scaler"])
        checkpoint.set_random_states(state["random_states"])
        if part is not None:
            self.order, self.steps_done, self.before = part["order"], part["step"], part["seconds"]
            self.first_lr = part["lr"]
            lead = part["total_loss"] if self.rank == 0 else 0.0
            self.total_loss = torch.tensor(lead, dtype=torch.float64, device=self.device)
            self.skipped = torch.tensor(part["skipped"], device=self.device)
            self.evaluated = {
                split: (count, sums.to(self.device) * (self.rank == 0))
                for split, (count, sums) in part["evaluated"].items()
            }
        if state["recount"] is not None:
            self.recounted = state["recount"]["images"]
            self.method.recounting = state["recount"]["counts"].to(self.device) * (self.rank == 0)


def resized(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A part of a prompt, (channels, rows, columns), for another image size: B's rows and A's columns interpolated."""
    return F.interpolate(tensor[None], shape[-2:], mode="bilinear")[0]


def evaluate(group: list[Training], split: str) -> dict[Training, Figures]:
    """Figures on a split of trials that share their batches, summed on the device and read once; without those that
    stopped. Goes on where all of them were stopped in it before."""
    first = group[0]
    images: datasets.Images = getattr(first.splits, split)
    begun = {training: training.evaluated.get(split) for training in group}
    places = {0 if found is None else found[0] for found in begun.values()}
    done = places.pop() if len(places) == 1 else 0
    nothing = torch.zeros(3, dtype=torch.float64, device=first.device)
    sums = {training: found[1] if found and done else nothing.clone() for training, found in begun.items()}
    size, share = first.config.eval_batch_size, (first.rank, first.processes)
    with torch.inference_mode():
        for pixels, labels in loader.batches(images, size, np.arange(done, len(images)), first.device, share):
            prepared = first.prepare(pixels)
            for training in list(sums):
                if distributed.broadcast_flag(training.should_stop):
                    training.evaluated[split] = done, sums.pop(training)
                else:
                    sums[training] = sums[training] + training.figures(prepared, labels)
            if not sums:
                return {}
            done = min(done + size, len(images))
    figures = {training: (distributed.all_reduce_sum(found) / len(images)).tolist() for training, found in sums.items()}
    for training, found in sums.items():
        training.evaluated[split] = done, found
    return {training: (loss, 100 * top1, 100 * top5) for training, (loss, top1, top5) in figures.items()}


def peak_memory_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts KiB
