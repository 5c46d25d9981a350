"""Evaluation: `base` defines a benchmark and how to add one; one file per benchmark (`vqav2`)."""
