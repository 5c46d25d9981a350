"""The report of the inspect command: `report` collects it, `text` formats it."""
