"""Label mappings, how the backbone's output becomes classes: a folder each, found by name (`head.kind`)."""
