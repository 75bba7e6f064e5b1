"""Benchmarks: data sets, sampling, grading and scores."""
