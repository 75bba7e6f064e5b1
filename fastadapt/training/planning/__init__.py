"""Estimates of a run: memory, operations, time, disk."""
