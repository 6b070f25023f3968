"""How a trial is trained: one trial, the loop, checkpoints, several processes."""
