"""Transcoder adapters: a sparse, readable account of what fine-tuning changed in a model."""
