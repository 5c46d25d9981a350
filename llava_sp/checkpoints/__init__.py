"""Checkpoints in every format: `reading` recognises, `opening` loads them; convert, inspect, merge are commands."""
