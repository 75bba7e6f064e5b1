"""Conversations to rendered text, to token sequences, to batches."""
