"""Benchmarks: data sets, sampling, grading, scores."""
