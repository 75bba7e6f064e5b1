"""Judges: an OpenAI-compatible endpoint, and token rules without a language model."""
