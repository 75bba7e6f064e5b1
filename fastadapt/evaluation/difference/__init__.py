"""Where a pair differs: the share of each part of the model in the difference."""
