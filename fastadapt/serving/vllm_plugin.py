"""vLLM loads exported checkpoints: the entry point ``vllm.general_plugins``.

vLLM can run any model of transformers in its own engine; an exported checkpoint is one once its
classes are registered. So the plugin registers them in every process of vLLM's, and names vLLM's
class for such models as theirs. Adapters cannot be switched off there, and ``batch_topk`` needs a
vLLM whose loader fills buffers too, since its threshold is one. Not run on a GPU yet.
"""

from __future__ import annotations

from fastadapt.models.hf_classes import classes_of
from fastadapt.models.hf_classes import register as register_with_transformers
from fastadapt.models.pretrained import ARCHITECTURES

#: vLLM's class for causal language models of transformers.
BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"


def register() -> None:
    """Called by vLLM when it starts."""
    from vllm import ModelRegistry

    register_with_transformers()
    known = ModelRegistry.get_supported_archs()
    for architecture in ARCHITECTURES:
        name = classes_of(architecture)[2].__name__
        if name not in known:
            ModelRegistry.register_model(name, BACKEND)
