"""The table and the page of a whole evaluation."""
