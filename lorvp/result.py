"""What a trial gives after each epoch: a line of its results, which whoever reads them has without torch."""

from __future__ import annotations

from dataclasses import dataclass


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
    parameters: dict[str, int]
    """How many numbers of each kind (prompt, tokens, head, backbone) were trained or fitted, as they are stored."""
    optimizer_state_mib: float
    """What the optimizers keep beside the parameters."""
    order: int
    """Which epoch's order of the data it had: its own, unless it joined others that were further."""
    packed: int = 1
    """Trials that shared its batches."""
    whole: bool = True
    """Whether it was at full size and on all training images, not at a rung, and in the last of a method's stages."""
    device: str = ""
    """What it was trained on: a GPU or a processor, as its maker calls it."""
    driver: str = ""
    """The version of NVIDIA's driver, on a GPU."""
    precision: str = ""
    """fp32, bf16 or fp16: what `auto` came to."""
    test_loss: float | None = None
    test_top1: float | None = None
    test_top5: float | None = None
    """Read once, in the last epoch's result, with the best epoch's prompt and head; in every result under
    `select: test_best_epoch`, there with that epoch's own; never without `read_test`."""
