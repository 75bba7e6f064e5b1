"""A trained run as one Hugging Face checkpoint, and the classes that load it.

``fastadapt export RUN --output FOLDER`` writes the checkpoint. Importing this package registers its
classes with transformers, after which ``AutoModelForCausalLM.from_pretrained`` loads it like any
other, without remote code::

    import fastadapt.serving
    model = AutoModelForCausalLM.from_pretrained(folder)
    with model.mode("hybrid"):      # adapters off
        model.generate_batch(...)

In vLLM the same happens by itself (:mod:`fastadapt.serving.vllm_plugin`).
"""

from fastadapt.models.hf_classes import AdaptedModel, register
from fastadapt.serving.export import export

__all__ = ["AdaptedModel", "export", "register"]

register()
