"""Autointerp: a judge describes and classifies units; detection scores the descriptions."""
