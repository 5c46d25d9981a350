"""Recognising a checkpoint folder without loading its tensors."""
