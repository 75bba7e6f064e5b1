"""Read untrusted files, write files atomically, and check names of paths."""
