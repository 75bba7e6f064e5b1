"""Sampling of responses, detection of loops in them, and speed of generation."""
