"""Base layer: files, schemas, processes, provenance, command line. Imports nothing else of this package."""
