"""Configuration of a run: the dataclasses of its keys, and the YAML files and command line that set them."""
