"""A sweep in virtual time: what it would take and find."""
