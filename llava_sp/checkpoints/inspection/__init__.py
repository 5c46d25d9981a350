"""What the inspect command reports: `report` finds it, `text` writes it for reading."""
