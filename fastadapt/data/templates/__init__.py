"""Chat templates of tokenizers: rendering with one, and choosing it or a family."""
