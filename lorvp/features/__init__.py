"""Cache a frozen backbone's outputs on unprompted images, and fit heads to them."""
