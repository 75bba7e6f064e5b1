"""Autointerp: a judge describes and classifies features or neurons, scored by detection."""
