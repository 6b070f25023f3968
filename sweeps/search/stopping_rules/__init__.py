"""Rules of early stopping: a file each, found by name (`early_stopping.rule`)."""
