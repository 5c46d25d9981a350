"""The ground floor: files, schemas, processes, provenance and the frame of a command. Imports nothing else of this package."""
