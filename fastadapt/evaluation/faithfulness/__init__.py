"""Measures of how closely a model's outputs follow the target's."""
