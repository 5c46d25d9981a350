"""Evaluation: `base` says what a benchmark is and how to add one; one file per benchmark (`vqav2`)."""
