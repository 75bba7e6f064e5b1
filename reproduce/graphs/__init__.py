"""Measurements of attribution graphs over many places of a run's held-out texts.

:mod:`.effects` compares predicted with measured effects of single features, and :mod:`.shares`
measures where the relevance of hesitation features comes from.
"""
