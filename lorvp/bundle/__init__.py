"""A trained prompt as a folder: its format, how it is saved and loaded, its model card."""
