"""No adapter: the backbone stays as it is."""
