"""The store of features, and its readers."""
