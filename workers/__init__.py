"""Worker entry points: one module per queue, configuration only."""
