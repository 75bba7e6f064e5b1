"""The pair, the replacement model, and the traversal of its blocks."""
