"""Models of transformers that hold adapters: classes, checkpoints, features in generation."""
