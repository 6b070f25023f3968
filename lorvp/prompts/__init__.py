"""Input prompts: a file each, found by name (`prompt.kind`)."""
