"""Data: records and images in LLaVA's formats, mixtures, the dataset, its order, batches, and two command-line views."""
