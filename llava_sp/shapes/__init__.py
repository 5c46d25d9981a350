"""The embedded default: a procedural world, tiny backbones, and one command that trains and scores LLaVA-SP on them."""
