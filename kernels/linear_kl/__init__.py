"""linear_kl: see the design."""
