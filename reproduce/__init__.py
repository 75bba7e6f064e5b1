"""One-off science: the recipe of the embedded pair, the study, the runs of the README."""
