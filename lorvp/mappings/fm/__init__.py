"""FM, a linear layer on the source logits."""
