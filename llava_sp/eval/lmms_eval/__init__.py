"""The model as lmms-eval sees it."""
