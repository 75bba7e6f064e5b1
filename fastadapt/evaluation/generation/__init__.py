"""Sampling from the compared models."""
