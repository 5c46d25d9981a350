"""Reading and checking what benchmarks are given."""
