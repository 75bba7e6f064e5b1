"""Read conversations, render them as text, tokenize them and batch the sequences."""
