"""What a benchmark shows: the terminal's tables, the page, charts and the model card."""
