"""The training run: what is resolved before it starts, one step, and the loop around it."""
