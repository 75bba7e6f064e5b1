"""Rendering with a tokenizer's chat template, and the choice between it and a known chat format."""
