"""One trial while it is trained: its stage, its epochs and its checkpoint. `loop.py` goes through the epochs."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch.nn import functional as F

from lorvp.bundle import io as bundle
from lorvp.bundle import predictions
from lorvp.config import TrialConfig
from lorvp.data import datasets, loader
from lorvp.data.augment import augment
from lorvp.errors import TrialFailed, UserError
from lorvp.features import cache as feature_cache
from lorvp.features import probe
from lorvp.optim.galore import state_bytes
from lorvp.optim.schedule import lr_factor
from lorvp.parts import BEST, LearnedHeadConfig, Trained, TrainedPromptConfig
from lorvp.result import EpochResult
from lorvp.training import checkpoint
from lorvp.training.epoch_state import EpochState, Evaluation
from lorvp.training.shared import SharedResources
from lorvp.training.stage import build_stage, carry_over
from lorvp.utils import device, distributed
from lorvp.utils.device import MicroBatches, suppress_out_of_memory

BUNDLE = "bundle"
TOP_K = 5


class Best(TypedDict):
    """The best epoch so far of those at full fidelity; epoch 0 before there is one."""

    epoch: int
    score: float
    """What it was chosen by, in percent: val or test top-1 (`select`)."""
    tuned: dict[str, torch.Tensor]
    classes: dict[str, torch.Tensor]
    """By split, the class that comes first on each image with these weights: (N,) int32 on the CPU."""


class Options(TypedDict, total=False):
    """What a trial is trained with besides its config; see `Trainer`."""

    folder: Path | None
    resume_from: Path | None
    should_stop: Callable[[], bool]


class Stopped(Exception):
    """The search gave up on the trial, or its job has to leave."""


Metrics = tuple[float, float, float]
"""Loss in nats, top-1 and top-5 in percent."""


class Trainer:
    """Train one trial, an epoch at a time.

    With a `folder`, a checkpoint is written there after every epoch, before its result is given out, and the best
    epoch's bundle and predictions at the end. With `resume_from`, a checkpoint of the same config, `results` holds its
    epochs and training goes on where it was, in the precision that it began in: on one machine the results are, bit
    for bit, those of a trial that was never interrupted. `should_stop` is asked before every batch, in training, in an
    evaluation and in a pass for a label mapping; once it returns True the trial leaves within the batch, and a
    checkpoint holds the part of the epoch that is done.

    Raises UserError for input that can't work.
    """

    def __init__(
        self,
        config: TrialConfig,
        shared: SharedResources,
        folder: Path | None = None,
        resume_from: Path | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        state = None if resume_from is None else checkpoint.read(resume_from, config)
        self.config = config
        self.shared = shared if state is None else shared.in_precision(state["precision"], config)
        self.folder = folder
        self.should_stop = should_stop
        self.device = self.shared.device
        self.rank, self.world_size = distributed.rank_and_world_size()
        if config.adapter.steps_per_layer and self.world_size > 1:
            raise UserError("adapter.per_layer frees gradients before several GPUs could average them")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.shared.precision == "fp16")
        self.micro_batches = MicroBatches(max(config.batch_size, config.eval_batch_size))
        self.steps_per_epoch = math.ceil(len(self.shared.splits.train) / config.batch_size)
        """Batches of all training images; the learning rate's schedule goes by them."""
        self.results: list[EpochResult] = []
        self.best = Best(epoch=0, score=0.0, tuned={}, classes={})
        self.steps_taken = 0.0
        """Places in the schedule that are used up, without those of steps that fp16 skipped."""
        self.next_shuffle_epoch = 1
        """The epoch whose order of the data the next one takes."""
        self.epoch = EpochState(self.device)
        self.start_time = self.training_start = time.perf_counter()
        """When the epoch under way was begun or gone on with, and when its training would have begun, uninterrupted."""
        begun = 1 if state is None else checkpoint.epoch_of(state)
        self.stage = build_stage(config, self.shared, config.rung(begun), config.stage(begun), self.micro_batches)
        if state is not None:
            self.load_state_dict(state)

    @property
    def done(self) -> bool:
        """Whether the last epoch has ended."""
        return len(self.results) == self.config.epochs

    @property
    def in_epoch(self) -> bool:
        """Whether an epoch's training has begun and the epoch has not ended."""
        return self.epoch.shuffle_epoch is not None

    @property
    def steps_per_stage(self) -> int:
        """Places in the schedule of one of the method's trainings."""
        return self.config.epochs // self.config.stages * self.steps_per_epoch

    # -- an epoch: start_epoch, then batches and train_step, then end_training and end_epoch

    def start_epoch(self, shuffle_epoch: int | None) -> None:
        """Begin an epoch on that epoch's order of the data, or go on with the one that was begun."""
        self.start_time = time.perf_counter()
        self._advance_stage()
        if not self.in_epoch:
            if not self.results:
                self._fit_head()
            self.stage.method.start_epoch(len(self.results) + 1, self._mapping_batches, self._train_predictions)
            self.epoch = EpochState(self.device, shuffle_epoch)
        self.training_start = time.perf_counter() - self.epoch.elapsed

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        """Yield what is left of the epoch: images ready for `train_step`, labels, and the size of the global batch.

        Images and labels are this process's share of the batch.
        """
        epoch, size, train = self._shuffle_epoch(), self.config.batch_size, self.stage.splits.train
        order = loader.epoch_order(len(train), self.config.order_seed, epoch)
        share = self.rank, self.world_size
        left = order[self.epoch.step * size :]
        starts = range(len(order) - len(left), len(order), size)
        for start, (images, labels) in zip(starts, loader.batches(train, size, left, self.device, share), strict=True):
            places = np.arange(start, min(start + size, len(order)))
            own, side = places[self.rank :: self.world_size], self.stage.shared.backbone.image_size
            images = augment(images, side, self.config.dataset, own, self.config.order_seed, epoch)
            yield self.prepare(images), labels, len(places)

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Prepare a batch once for all trials that share it, where memory allows that."""
        if self.stage.reads_features:
            return images
        with suppress_out_of_memory():
            return self.stage.method.prepare(images)
        return images  # the method prepares the parts that it takes

    def train_step(self, images: torch.Tensor, labels: torch.Tensor, global_batch_size: int) -> None:
        """Make one step on this process's share of a batch. Raises Stopped before it where the trial has to leave."""
        if distributed.broadcast_flag(self.should_stop):
            self.epoch.elapsed = time.perf_counter() - self.training_start
            raise Stopped
        stage, epoch = self.stage, self.epoch
        step = self.steps_taken + epoch.step * self.steps_per_epoch / stage.steps_per_epoch(self.config.batch_size)
        step -= stage.number * self.steps_per_stage
        factor = lr_factor(self.config.schedule, step, self.steps_per_stage, self.steps_per_epoch)
        for name, optimizer in stage.optimizers.items():
            optimizer.param_groups[0]["lr"] = stage.base_lr[name] * factor
        epoch.total_loss += self._backward(images, labels, self.world_size / global_batch_size)
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for name, optimizer in stage.optimizers.items():
            if name == "head" and self._head_is_frozen():
                continue
            self.scaler.unscale_(optimizer)
            gradients = [p.grad for p in stage.groups[name] if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            finite &= norm.isfinite()
            options = self.config.parts[name]
            if isinstance(options, TrainedPromptConfig) and options.normalize_grad:
                torch._foreach_div_(gradients, norm.clamp(min=torch.finfo(norm.dtype).tiny))
            if isinstance(options, Trained) and options.clip_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(stage.groups[name], options.clip_grad_norm, norm)
            self.scaler.step(optimizer)
        self._zero_grad()
        self.scaler.update()
        epoch.lr = epoch.lr or {name: base * factor for name, base in stage.base_lr.items()}
        epoch.skipped += ~finite
        epoch.step += 1

    def end_training(self) -> None:
        """Stop the clock of the epoch's training; its validation follows."""
        self.epoch.elapsed = time.perf_counter() - self.training_start

    def refit_head(self) -> None:
        """After the last epoch's training, fit the head to the prompted images, where the config asks for it.

        The fit is taken if its val accuracy is above that of the trained head. Raises Stopped where the trial has to
        leave; it is then begun again.
        """
        head, last = self.config.head, len(self.results) + 1 == self.config.epochs
        if not (isinstance(head, LearnedHeadConfig) and head.refit and last) or "val" in self.epoch.evaluated:
            return
        splits, mapping = self.stage.splits, self.stage.method.mapping
        train, val = self._prompted_outputs(splits.train), self._prompted_outputs(splits.val)
        with feature_cache.temporary_cache():  # nobody asks for these outputs again
            fit = self._fit(train, val, BEST, probe.CS[::3], self._check_alone)
        x, labels = val.pixels.to(self.device), torch.from_numpy(val.labels).to(self.device)
        trained = mapping.head.weight.detach(), mapping.head.bias.detach()
        if probe.accuracy(fit, x, labels) > probe.accuracy(trained, x, labels):
            mapping.head.load_state_dict({"weight": fit[0], "bias": fit[1]})

    def end_epoch(self, val: Metrics, packed: int) -> EpochResult:
        """End the epoch with its metrics on val, and return its result, which the checkpoint then holds.

        The last epoch reads the test set with the best epoch's prompt. `packed` trials shared the batches.

        Raises TrialFailed when the loss is no longer a number, and Stopped where the trial has to leave.
        """
        number, shuffle_epoch, train_loss = len(self.results) + 1, self._shuffle_epoch(), self._train_loss()
        if not math.isfinite(train_loss):
            raise TrialFailed(f"train loss is {train_loss} in epoch {number}")
        test: Metrics | None = None
        if self.config.select == "test_best_epoch":  # val may be the test set
            test = self._evaluate("test") if self.config.dataset.holds_back else val
        best = self._best_with(number, val[1], test)
        if self.config.select == "val" and self.config.read_test and number == self.config.epochs:
            test = self._test_of(best)
            best = best | {"classes": best["classes"] | self._classes("test")}
        result = EpochResult(
            epoch=number,
            train_loss=train_loss,
            val_loss=val[0],
            val_top1=val[1],
            val_top5=val[2],
            lr=self.epoch.lr,
            images_per_second=len(self.stage.splits.train) / self.epoch.elapsed,
            peak_memory_mib=peak_memory_mib(self.device),
            seconds=time.perf_counter() - self.start_time,
            time=time.time(),
            parameters=self.parameters(),
            optimizer_state_mib=sum(map(state_bytes, self.stage.optimizers.values())) / 2**20,
            order=shuffle_epoch,
            packed=packed,
            whole=self.stage.full_fidelity(self.config),
            device=device.name(self.device),
            driver=device.driver(self.device),
            precision=self.shared.precision,
            test_loss=None if test is None else test[0],
            test_top1=None if test is None else test[1],
            test_top5=None if test is None else test[2],
        )
        # all at once, and not before: the reading of the test set may have been left half-way
        self.results.append(result)
        self.best, self.steps_taken = best, self.steps_taken + self._places_used()
        self.next_shuffle_epoch, self.epoch = shuffle_epoch + 1, EpochState(self.device)
        self.save()
        return result

    def parameters(self) -> dict[str, int]:
        """Return how many numbers of each part were trained, or fitted."""
        groups = {"head": list(self.stage.method.mapping.parameters())} | self.stage.method.groups()
        return {name: sum(p.numel() for p in group) for name, group in groups.items() if group}

    def save_bundle(self) -> None:
        """Leave the best epoch's bundle in the folder, and beside it which class it gives each val and test image.

        Raises RuntimeError where a frozen backbone has moved.
        """
        if not self.config.trains_backbone:
            self.stage.shared.backbone.check_unmoved()
        if self.folder is None or not self.best["epoch"]:
            return
        self.stage.method.load_trainable_state_dict(self.best["tuned"])
        bundle.save(
            self.folder / BUNDLE,
            self.stage.method,
            self.config,
            self.shared.precision,
            self.stage.splits.class_names,
            self.best["epoch"],
            self.results,
            example=self.stage.shared.splits.val.read([0]),  # an image, also where the model reads features
        )
        labels = {split: getattr(self.stage.splits, split).labels for split in self.best["classes"]}
        predicted = {
            split: predictions.Predictions(labels[split], classes.numpy())
            for split, classes in self.best["classes"].items()
        }
        predictions.write(self.folder / predictions.PREDICTIONS, predicted)

    # -- the parts of an epoch

    def _shuffle_epoch(self) -> int:
        assert self.epoch.shuffle_epoch is not None  # within an epoch
        return self.epoch.shuffle_epoch

    def _advance_stage(self) -> None:
        """Go on to the epoch's stage with what was learned, and read its features where it trains a head alone."""
        number, before = len(self.results) + 1, self.stage
        rung, training = self.config.rung(number), self.config.stage(number)
        if rung != before.rung:
            self.stage = build_stage(self.config, self.shared, rung, training, self.micro_batches)
            carry_over(before, self.stage)
        elif training != before.number and not self.in_epoch:
            self.stage = build_stage(self.config, self.shared, rung, training, self.micro_batches)
            self.stage.method.start_stage(before.method)
            self.steps_taken = float(training * self.steps_per_stage)
        if self.stage.reads_features and not self.stage.features_are_read:
            splits, output = self.stage.shared.splits, self.stage.method.mapping.input
            features = {name: self._outputs(getattr(splits, name), output) for name in ("train", "val", "test")}
            self.stage = replace(self.stage, splits=datasets.Splits(**features))

    def _fit_head(self) -> None:
        """Fit the head to the images without a prompt, where the config starts from a fitted one."""
        head = self.config.head
        if not (isinstance(head, LearnedHeadConfig) and head.fitted):
            return
        splits, method = self.stage.shared.splits, self.stage.method
        train, val = (
            self._head_input(self._outputs(images, method.mapping.input)) for images in (splits.train, splits.val)
        )
        cs = probe.CS if method.trains_head_only else probe.CS[::3]  # a start need not be as exact as the control
        method.load_head(*self._fit(train, val, head.fit, cs, self._check_alone))

    def _fit(
        self,
        train: datasets.ArrayImages,
        val: datasets.ArrayImages,
        fit_to: float | str,
        cs: np.ndarray,
        check: Callable[[], None],
    ) -> probe.Head:
        """Fit a head to a backbone's outputs, with the C that `fit_to` says or that is best on val."""
        both = train if self.config.dataset.train_on_val else None
        if both is not None:  # C is chosen without val's images, which are its last ones
            train = train.subset(np.arange(len(train) - len(val)))
        return probe.head(train, val, fit_to, self.device, cs, both, check)

    def _prompted_outputs(self, images: datasets.Images) -> datasets.ArrayImages:
        """Return the backbone's outputs with prompt and adapter in place, which the label mapping reads."""
        method, size = self.stage.method, self.config.eval_batch_size
        outputs: list[torch.Tensor] = []

        def read(pixels: torch.Tensor) -> torch.Tensor:
            return method.backbone_output(method.prepare(pixels), method.mapping.input)

        with torch.inference_mode():
            for pixels, _ in loader.batches(images, size, device=self.device):
                self._check()
                outputs += self.micro_batches.run(read, pixels)
        return datasets.ArrayImages(torch.cat(outputs).cpu(), images.labels, self.stage.splits.class_names)

    def _head_is_frozen(self) -> bool:
        head = self.config.head
        return isinstance(head, LearnedHeadConfig) and len(self.results) < head.freeze_epochs

    def _head_input(self, outputs: datasets.ArrayImages) -> datasets.ArrayImages:
        """Return the backbone's outputs as a fitted head reads them."""
        read = self.stage.method.head_input(outputs.pixels)
        return outputs if read is outputs.pixels else datasets.ArrayImages(read, outputs.labels, outputs.class_names)

    def _outputs(self, images: datasets.Images, output: feature_cache.Output) -> datasets.ArrayImages:
        """Return the backbone's outputs from the cache; one of several processes computes them, and the others wait."""
        return feature_cache.get(
            self.stage.shared.backbone, images, output, self.config.eval_batch_size, self._check_alone
        )

    def _train_predictions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the backbone's source class of each training image without a prompt, and the labels: (N,) int64."""
        top = self._outputs(self.stage.shared.splits.train, "top")
        return top.pixels.to(self.device), torch.from_numpy(top.labels).to(self.device)

    def _mapping_batches(self) -> loader.Batches:
        """Yield this process's share of the training images that the pass for a label mapping has not counted yet."""
        images, size = self.stage.shared.splits.train, self.config.eval_batch_size
        left = np.arange(self.epoch.recounted, len(images))
        for batch in loader.batches(images, size, left, self.device, (self.rank, self.world_size)):
            self._check()
            yield batch
            self.epoch.recounted = min(self.epoch.recounted + size, len(images))

    def _backward(self, images: torch.Tensor, labels: torch.Tensor, scale: float) -> torch.Tensor:
        """Add the gradients of the sum of the losses times `scale`, and return that sum: () float64 or float32."""

        def backward(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            loss = F.cross_entropy(self.stage.ddp_model(images), labels, reduction="sum")
            penalty = self.stage.method.penalty()
            total = loss if penalty is None else loss + len(images) * penalty
            self.scaler.scale(total * scale).backward()  # processes' gradients are averaged, not summed
            return loss.detach()

        # several processes would wait for gradients that never come; per layer, some weights have made their step
        may_split = self.world_size == 1 and not self.config.adapter.steps_per_layer
        losses = self.micro_batches.run(backward, images, labels, may_split=may_split, undo=self._undo_batch)
        self.stage.method.count(labels)
        return torch.stack(losses).sum(0)

    def _undo_batch(self) -> None:
        self._zero_grad()
        self.stage.method.discard_predictions()

    def _zero_grad(self) -> None:
        for optimizer in self.stage.optimizers.values():
            optimizer.zero_grad()

    def _train_loss(self) -> float:
        """Return the mean loss over the epoch's training images, in nats."""
        if not self.stage.optimizers:
            return self._evaluate("train")[0]
        return distributed.all_reduce_sum(self.epoch.total_loss).item() / len(self.stage.splits.train)

    def _places_used(self) -> float:
        """Return how much of the schedule the epoch has used up.

        A step that fp16 skipped uses up none. That is known only here, without a transfer in every step, so the
        schedule falls back at the start of the next epoch.
        """
        skipped = int(self.epoch.skipped) if self.scaler.is_enabled() else 0
        return self.steps_per_epoch - skipped * self.steps_per_epoch / self.stage.steps_per_epoch(
            self.config.batch_size
        )

    def _best_with(self, number: int, val_top1: float, test: Metrics | None) -> Best:
        """Return the best epoch so far, the one under way among them."""
        score = val_top1 if test is None else test[1]
        learned_val = self.config.dataset.train_on_val and test is None  # it no longer tells epochs apart
        better = not self.best["epoch"] or learned_val or score > self.best["score"]
        if self.stage.full_fidelity(self.config) and better:
            splits = ("val", "test") if test is not None else ("val",)
            tuned = self.stage.method.trainable_state_dict()
            return Best(epoch=number, score=score, tuned=tuned, classes=self._classes(*splits))
        return self.best

    def _classes(self, *splits: str) -> dict[str, torch.Tensor]:
        """Return the class that came first on each image of splits that the epoch has evaluated: (N,) int32 on the CPU.

        Every process must call it. Where nothing is held back (val_fraction 0), val is the test set.
        """
        same = {} if self.config.dataset.holds_back else {"test": "val"}
        evaluated = {split: self.epoch.evaluated[same.get(split, split)] for split in splits}
        return {split: distributed.all_reduce_sum(each.classes).cpu() for split, each in evaluated.items()}

    # -- evaluation

    def batch_metrics(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return sums over the images, (3,) float64, and the class that comes first on each, (N,) int64.

        The sums are those of the losses, and how many labels are first and among the first five.
        """

        def measure(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = self.stage.model(images)
            top = logits.topk(min(TOP_K, self.stage.method.classes), dim=1).indices
            ranked = top == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            return torch.stack([loss, ranked[:, 0].sum(), ranked.sum()]).double(), top[:, 0]

        sums, classes = zip(*self.micro_batches.run(measure, images, labels), strict=True)
        return torch.stack(sums).sum(0), torch.cat(classes)

    def _evaluate(self, split: str) -> Metrics:
        metrics = evaluate([self], split).get(self)
        if metrics is None:
            raise Stopped
        return metrics

    def _test_of(self, best: Best) -> Metrics:
        """Return the metrics on the test set with the best epoch's prompt and head."""
        method = self.stage.method
        last = method.trainable_state_dict()
        method.load_trainable_state_dict(best["tuned"])
        try:
            return self._evaluate("test")
        finally:  # a checkpoint of a trial that is stopped here holds what it was trained to
            method.load_trainable_state_dict(last)

    def _check(self) -> None:
        if distributed.broadcast_flag(self.should_stop):
            raise Stopped

    def _check_alone(self) -> None:
        """Check for a stop where this process is the only one: of several, one computes what is cached."""
        if self.world_size == 1:
            self._check()

    # -- the checkpoint

    @property
    def unsaved(self) -> bool:
        """Whether there is something of an epoch that the last checkpoint does not hold."""
        return self.epoch.phase != "between"

    def save(self) -> None:
        """Write the checkpoint, between two batches; every process must call it."""
        state = self.state_dict()
        if self.folder is not None:
            checkpoint.write(self.folder, state)

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on: plain values and tensors."""
        method, counts = self.stage.method, self.stage.method.counts
        return {
            "config_hash": self.config.content_hash(),
            "results": [asdict(result) for result in self.results],
            "best": self.best,
            "steps_taken": self.steps_taken,
            "next_shuffle_epoch": self.next_shuffle_epoch,
            "epoch": self.epoch.state_dict(method),
            "precision": self.shared.precision,
            "tuned": method.trainable_state_dict(),
            "counts": None if counts is None else distributed.all_reduce_sum(counts),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.stage.optimizers.items()},
            "scaler": self.scaler.state_dict(),
            "random_states": checkpoint.random_states(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called; the stage must be that epoch's."""
        method, first = self.stage.method, self.rank == 0
        self.results = [EpochResult(**values) for values in state["results"]]
        self.best, self.steps_taken = state["best"], state["steps_taken"]
        self.next_shuffle_epoch = state["next_shuffle_epoch"]
        method.load_trainable_state_dict(state["tuned"])
        if state["counts"] is not None:
            method.counts = state["counts"].to(self.device) * first
        for name, optimizer in self.stage.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.scaler.load_state_dict(state["scaler"])
        checkpoint.set_random_states(state["random_states"])
        self.epoch = EpochState.from_state_dict(state["epoch"], method, self.device, first)


def evaluate(trainers: list[Trainer], split: str) -> dict[Trainer, Metrics]:
    """Return metrics on a split of trials that share their batches, without the trials that stopped.

    Sums stay on the device and are read once. Goes on where all of the trials were stopped in it before.
    """
    if not trainers:
        return {}
    first = trainers[0]
    images: datasets.Images = getattr(first.stage.splits, split)
    begun = {trainer: trainer.epoch.evaluated.get(split) for trainer in trainers}
    places = {0 if progress is None else progress.images for progress in begun.values()}
    done = places.pop() if len(places) == 1 else 0
    sums, classes = {}, {}
    for trainer, progress in begun.items():
        if progress is None or not done:
            zero = torch.zeros(3, dtype=torch.float64, device=first.device)
            progress = Evaluation(0, zero, torch.zeros(len(images), dtype=torch.int32, device=first.device))
        sums[trainer], classes[trainer] = progress.sums, progress.classes.clone()
    size, share = first.config.eval_batch_size, (first.rank, first.world_size)
    with torch.inference_mode():
        for pixels, labels in loader.batches(images, size, np.arange(done, len(images)), first.device, share):
            prepared = first.prepare(pixels)
            own = slice(done + first.rank, done + size, first.world_size)
            for trainer in list(sums):
                if distributed.broadcast_flag(trainer.should_stop):
                    trainer.epoch.evaluated[split] = Evaluation(done, sums.pop(trainer), classes[trainer])
                else:
                    batch_sums, classes[trainer][own] = trainer.batch_metrics(prepared, labels)
                    sums[trainer] = sums[trainer] + batch_sums
            if not sums:
                return {}
            done = min(done + size, len(images))
    for trainer, total in sums.items():
        trainer.epoch.evaluated[split] = Evaluation(done, total, classes[trainer])
    means = {trainer: (distributed.all_reduce_sum(total) / len(images)).tolist() for trainer, total in sums.items()}
    return {trainer: (loss, 100 * top1, 100 * top5) for trainer, (loss, top1, top5) in means.items()}


def peak_memory_mib(device: torch.device) -> float:
    """Return the largest memory so far in MiB: allocated on the GPU, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts KiB
