"""Training of adapters: configuration, loop, optimiser, checkpoints, memory plan, report."""
