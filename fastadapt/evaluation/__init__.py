"""Measures of how faithful replacement models are to their target."""
