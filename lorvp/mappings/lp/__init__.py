"""LP, a linear probe, a new head on the features."""
