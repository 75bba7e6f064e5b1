"""Let vLLM load exported checkpoints, through the entry point ``vllm.general_plugins``.

vLLM can run any transformers model whose classes are registered. The plugin registers the classes
with transformers in every vLLM process, and maps their names to vLLM's class for transformers
models. vLLM cannot switch adapters off. ``batch_topk`` needs a vLLM version whose loader also fills
buffers, since its threshold is a buffer. The plugin has not been run on a GPU yet.

vLLM calls the plugin in every process, whatever model it serves. The plugin therefore only adds
names that begin with ``Fastadapt`` or ``fastadapt_``: no setting, patch or class of vLLM changes,
and an error of the registration is logged instead of raised.
"""

from __future__ import annotations

import importlib.util
import logging

from fastadapt.models.architectures import ARCHITECTURES
from fastadapt.models.hf_classes import classes_of
from fastadapt.models.hf_classes import register as register_with_transformers

#: vLLM's class for causal language models of transformers. vLLM imports it when it is needed.
BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"

_log = logging.getLogger(__name__)


def register() -> None:
    """Register the exported classes; vLLM calls this function when it starts.

    Does nothing where vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        return
    from vllm import ModelRegistry

    try:
        register_with_transformers()
        names = [classes_of(architecture)[2].__name__ for architecture in ARCHITECTURES]
    except Exception:  # raised, it would end every vLLM process of this environment
        _log.exception(
            "fastadapt: its classes do not fit the installed transformers, so that vLLM cannot "
            "load exported checkpoints of fastadapt; other models are not affected"
        )
        return
    known = ModelRegistry.get_supported_archs()
    for name in names:
        if name not in known:
            ModelRegistry.register_model(name, BACKEND)
