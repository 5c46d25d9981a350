"""Rules that several benchmarks score by."""
