"""What a trial will take, told before it runs: memory and time."""
