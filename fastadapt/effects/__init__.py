"""What features do to the output: on one prompt, by ablation, and for a whole run."""
