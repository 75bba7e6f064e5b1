"""Configuration, optimiser, checkpoints, memory plan, and the loop that trains the adapters."""
