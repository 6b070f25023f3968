"""What tests of whole sweeps share: drivers and their sweeps, a SLURM, and points at which a process can be held."""

import pytest

pytest.register_assert_rewrite("support.sweep", "support.slurm", "support.waiting", "support.holds")
