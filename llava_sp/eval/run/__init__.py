"""From questions to results: the machinery behind every benchmark."""
