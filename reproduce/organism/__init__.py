"""Recipe of the embedded pair: problems, tokenizer, training, acceptance.

Run with ``python -m reproduce.organism build|check|sample``. The pair is in ``fastadapt/organism``.
"""
