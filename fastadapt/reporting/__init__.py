"""Figures, tables, pages and formatted numbers of reports."""
