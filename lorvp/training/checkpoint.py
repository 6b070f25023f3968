"""Where a trial is, for whoever goes on with it: one file in its folder, replaced in one step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lorvp.config import TrialConfig
from lorvp.errors import UserError
from lorvp.utils.files import replacing

CHECKPOINT = "checkpoint.pt"


def write(folder: Path, state: dict[str, Any]) -> None:
    """Write the state in place of an earlier one. Raises OSError where the disk is full."""
    with replacing(folder / CHECKPOINT) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)  # given a path, torch would not say that the disk is full


def read(path: Path, config: TrialConfig) -> dict[str, Any]:
    """Return the state that `write` wrote. Raises UserError when it is another config's."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if state["config_hash"] != config.content_hash():
        raise UserError(f"{path}: the checkpoint of trial {state['config_hash']}, not of {config.content_hash()}")
    return state


def epoch_of(state: dict[str, Any]) -> int:
    """Return the epoch, from 1, whose stage the state's tensors belong to: the one under way, else the last one."""
    epochs = len(state["results"])
    return max(1, epochs) if state["epoch"]["phase"] == "between" else epochs + 1


def random_states() -> dict[str, Any]:
    """Return the states of torch's random generators, the CPU's and each GPU's."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_states(states: dict[str, Any]) -> None:
    """Put `random_states` back; those of GPUs only where there are as many."""
    torch.set_rng_state(states["cpu"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
