"""Two stages of a fine-tuning, and adapters of the later one that begin as those of the earlier."""
