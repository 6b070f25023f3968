"""Estimate a trial's memory and time before it runs."""
