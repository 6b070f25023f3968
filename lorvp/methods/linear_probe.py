"""The linear probe: no prompt, a head alone."""

from __future__ import annotations

from torch import nn

from lorvp.methods.base import Method


class LinearProbe(Method):
    """No prompt, only a head: the control that a prompt's gain is measured against.

    With `head_init: linear_probe` the head is fitted before the first epoch, and there is nothing left to train.
    """

    trains_head_only = True

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the head; nothing where the head is fitted."""
        return {} if self.config.head_init == "linear_probe" else super().groups()
