"""Figures, tables, pages, and the formatting of numbers."""
