"""Input prompts: a folder each, found by name (`prompt.kind`)."""
