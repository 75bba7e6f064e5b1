"""Load model pairs, wire adapters into them, and run their blocks layer by layer."""
