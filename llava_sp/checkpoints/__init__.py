"""Checkpoints in every format: `reading` finds what is there, `opening` makes a model of it; convert, inspect, merge are commands."""
