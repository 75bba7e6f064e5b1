"""Tiny multimodal checkpoints: a text model of three blocks beside a tower of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_TOWER = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}

#: By multimodal architecture: its text model's, and the settings of its tower and of the whole.
TEXT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("gemma3_text", _TOWER, {"mm_tokens_per_image": 4}),
    "gemma4": (
        "gemma4_text",
        {**_TOWER, "model_type": "gemma4_vision", "num_key_value_heads": 2, "head_dim": 4},
        {},
    ),
    "internvl": (
        "qwen2",
        {**_TOWER, "image_size": [8, 8], "patch_size": [4, 4]},
        {"image_seq_length": 1},
    ),
    "llava": ("llama", _TOWER, {}),
    "mistral3": ("mistral", {**_TOWER, "head_dim": 4}, {}),
    "qwen3_5": (
        "qwen3_5_text",
        {
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "patch_size": 4,
            "num_position_embeddings": 16,
        },
        {},
    ),
    "smolvlm": ("llama", _TOWER, {"scale_factor": 2}),
}


#: Those that older releases of transformers saved with other names of tensors.
OLDER = ("gemma3", "internvl", "llava", "mistral3")


def multimodal_model(architecture: str, text: Any, seed: int) -> Any:
    """Return a random multimodal model with a text model of the given configuration."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    _, tower, whole = TEXT[architecture]
    default: Any = AutoConfig.for_model(architecture)
    kind = getattr(default.vision_config, "model_type", None)
    config = type(default)(
        text_config=text.to_dict(),
        vision_config={"model_type": kind, **tower},
        tie_word_embeddings=False,
        **whole,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(0, 0.3)
    return model.eval()


def save_older(model: Any, folder: Path) -> None:
    """Save a model with the names of tensors of older releases of transformers."""
    from safetensors.torch import save_file

    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    older = {
        "language_model.lm_head.": "lm_head.",
        "language_model.model.": "model.language_model.",
        "": "model.",
    }
    tensors = {}
    for name, tensor in model.state_dict().items():
        new, old = next((n, o) for n, o in older.items() if name.startswith(o))
        tensors[new + name.removeprefix(old)] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
