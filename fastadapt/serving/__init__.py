"""Export a trained run as one Hugging Face checkpoint, and register the classes that load it.

``fastadapt export RUN --output FOLDER`` writes the checkpoint. Importing this package registers its
classes with transformers. ``AutoModelForCausalLM.from_pretrained`` then loads the checkpoint
without remote code::

    import fastadapt.serving
    model = AutoModelForCausalLM.from_pretrained(folder)
    with model.mode("hybrid"):      # adapters off
        model.generate_batch(...)

vLLM registers the classes itself, through :mod:`fastadapt.serving.vllm_plugin`.
"""

from fastadapt.models.huggingface.classes import AdaptedCausalLM, AdaptedModel, register
from fastadapt.serving.export import export

__all__ = ["AdaptedCausalLM", "AdaptedModel", "export", "register"]

register()
