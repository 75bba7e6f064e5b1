"""Let vLLM load exported checkpoints, through the entry point ``vllm.general_plugins``.

vLLM can run any transformers model whose classes are registered. The plugin registers the classes
with transformers in every vLLM process, and maps their names to vLLM's class for transformers
models. vLLM cannot switch adapters off. ``batch_topk`` needs a vLLM version whose loader also fills
buffers, since its threshold is a buffer. The plugin has not been run on a GPU yet.

vLLM calls the plugin in every process, whatever model it serves. The plugin therefore only adds
names that begin with ``Fastadapt`` or ``fastadapt_``: no setting, patch or class of vLLM changes.
The import of this module registers with transformers already. vLLM logs an error of that import,
and serves other models all the same.
"""

from __future__ import annotations

import importlib.util

from fastadapt.models.architectures import ARCHITECTURES
from fastadapt.models.huggingface.classes import classes_of
from fastadapt.models.huggingface.classes import register as register_with_transformers

#: vLLM's class for causal language models of transformers. vLLM imports it when it is needed.
BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"


def register() -> None:
    """Register the exported classes; vLLM calls this function when it starts.

    Does nothing where vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        return
    from vllm import ModelRegistry

    register_with_transformers()
    known = ModelRegistry.get_supported_archs()
    for architecture in ARCHITECTURES:
        name = classes_of(architecture)[2].__name__
        if name not in known:
            ModelRegistry.register_model(name, BACKEND)
