"""GaLore, fine-tuning by gradients of low rank."""
