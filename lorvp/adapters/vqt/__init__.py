"""Visual query tuning, query tokens that read every layer."""
