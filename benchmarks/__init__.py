"""Benchmarks of the kernels and of feature collection; not part of the installed package.

``pytest benchmarks/ --benchmark-only`` runs every row, with small shapes on a CPU and the paper's
shapes on a GPU. ``python benchmarks/gpu.py`` checks and measures kernels and whole steps on a GPU,
in three commands, and writes JSON files. ``python -m benchmarks.report`` writes tables and plots
of such files.
"""
