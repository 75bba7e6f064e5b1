"""transcoder: see the design."""
