"""No prompt: the backbone sees the image as it is."""
