"""nmse: see the design."""
