"""What the wrapper and an iteration cost, a question a file; the grid of the paper's tables in `lab`."""
