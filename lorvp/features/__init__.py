"""What a frozen backbone computes once: its cached outputs on images without a prompt, and heads fitted to them."""
