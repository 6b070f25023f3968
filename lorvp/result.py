"""Define the result of one epoch, in a module that can be imported without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EpochResult:
    """Hold the result of one epoch. Accuracies are in percent and losses in nats, both averaged over images."""

    epoch: int
    train_loss: float
    val_loss: float
    val_top1: float
    val_top5: float
    lr: dict[str, float]
    """Learning rate of each part (prompt, adapter, head) at the epoch's first step."""
    images_per_second: float
    """Training throughput, data loading included and validation excluded."""
    peak_memory_mib: float
    """Largest value so far: memory allocated on the GPU, or resident memory of the process on a CPU."""
    seconds: float
    time: float
    """Unix time at the end of the epoch."""
    parameters: dict[str, int]
    """Number of trained or fitted parameters of each part (prompt, adapter, head)."""
    optimizer_state_mib: float
    """Size of the optimizers' state, without the parameters."""
    order: int
    """Number of the shuffle that the epoch used: its own epoch number, unless the trial joined others further on."""
    packed: int = 1
    """Number of trials that shared its batches."""
    whole: bool = True
    """Whether the epoch ran at full image size on all training images, and in the last of the method's stages."""
    device: str = ""
    """Name of the GPU or processor that the epoch was trained on."""
    driver: str = ""
    """Version of NVIDIA's driver; empty on a CPU."""
    precision: str = ""
    """fp32, bf16 or fp16: the precision that was used, also where the config says `auto`."""
    test_loss: float | None = None
    test_top1: float | None = None
    test_top5: float | None = None
    """Test top-5 accuracy. The test set is read once, for the last epoch's result, with the best epoch's prompt and
    head. Under `select: test_best_epoch` it is read in every epoch, with that epoch's own. Without `read_test` it is
    never read."""
