"""Let vLLM load exported checkpoints, through the entry point ``vllm.general_plugins``.

vLLM can run any transformers model whose classes are registered. The plugin registers the classes
with transformers in every vLLM process, and maps their names to vLLM's class for transformers
models. vLLM cannot switch adapters off. ``batch_topk`` needs a vLLM version whose loader also fills
buffers, since its threshold is a buffer. The plugin has not been run on a GPU yet.
"""

from __future__ import annotations

from fastadapt.models.architectures import ARCHITECTURES
from fastadapt.models.hf_classes import classes_of
from fastadapt.models.hf_classes import register as register_with_transformers

#: vLLM's class for causal language models of transformers.
BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"


def register() -> None:
    """Register the exported classes; vLLM calls this function when it starts."""
    from vllm import ModelRegistry

    register_with_transformers()
    known = ModelRegistry.get_supported_archs()
    for architecture in ARCHITECTURES:
        name = classes_of(architecture)[2].__name__
        if name not in known:
            ModelRegistry.register_model(name, BACKEND)
