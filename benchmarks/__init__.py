"""Benchmarks of the kernels, on any machine; not part of the installed package.

``pytest benchmarks/ --benchmark-only`` runs every row, at small shapes on a CPU and at the paper's
on a GPU. ``python benchmarks/gpu.py`` checks the kernels on a GPU and then, if they are right,
measures them into one JSON. ``python -m benchmarks.report`` makes tables and plots of such files.
"""
