"""The transcoder adapter of one layer, and its files."""
