"""Adapters, what is trained within the backbone: a folder each, found by name (`adapter.kind`)."""
