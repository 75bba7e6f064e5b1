"""Sources of a pair's weights: PEFT folders, low-rank layers, shared storage, fingerprints."""
