"""Measurements of attribution graphs over many places of a run's held-out texts.

:mod:`.effects` compares predicted with measured effects of single features, :mod:`.shares`
measures where the relevance of hesitation features comes from, and :mod:`.gate` compares graphs of
the gated pair with its ground truth.
"""
