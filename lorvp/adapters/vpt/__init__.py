"""Visual prompt tuning, tokens beside the image's."""
