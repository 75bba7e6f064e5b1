"""The store of features and what reads it."""
