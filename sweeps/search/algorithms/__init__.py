"""Search algorithms: a file each, found by name (`search.algorithm`)."""
