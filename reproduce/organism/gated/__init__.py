"""Problems of the gated pair: longer reasoning, many words, and corrections that a marker gates."""
