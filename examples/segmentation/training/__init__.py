"""The training step, the loop around it, and what survives an interruption."""
