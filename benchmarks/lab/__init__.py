"""The grid of the paper's tables: declared, run, scored, and written to docs/results.md."""
