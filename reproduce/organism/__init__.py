"""The recipe of the embedded pair: problems, tokenizer, training, acceptance.

``python -m reproduce.organism build|check|sample``; the pair itself is in ``fastadapt/organism``.
"""
