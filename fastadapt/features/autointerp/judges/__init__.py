"""Judges: an OpenAI-compatible endpoint, and rules without a language model."""
