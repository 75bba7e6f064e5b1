"""Files: guarded reading, atomic writing, and names that may become paths."""
