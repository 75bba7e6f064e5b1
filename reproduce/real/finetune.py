"""Train the LoRA: all linear layers of all blocks, on the assistant's tokens.

The recipe is seeded.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastadapt.errors import UserError

#: Name of the base in ``adapter_config.json``.
BASE = "SmolLM2-135M-Instruct"
RANK, ALPHA = 8, 16
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LR, WARMUP, CLIP = 1e-3, 0.05, 1.0
#: Texts of an update; longer texts are left out.
BATCH, LONGEST = 4, 512


def finetune(
    base: Path,
    conversations: Sequence[dict[str, Any]],
    out: Path,
    *,
    seed: int,
    progress: Callable[[int, int, float], None],
) -> int:
    """Train a LoRA of ``base`` for one epoch and save it to ``out`` in bfloat16.

    Args:
        base: folder of the base model.
        conversations: rows with ``messages`` of a user's and an assistant's turn.
        out: folder to write; its files are replaced.
        seed: seed of the initial weights and the order of the texts.
        progress: called after each update with the number of updates done, of all updates, and the
            mean loss of the update's texts in nats per token.

    Returns:
        Number of texts that were trained on.

    Raises:
        UserError: no text has at most :data:`LONGEST` tokens.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = [encode(tokenizer, row["messages"]) for row in conversations]
    texts = [text for text in texts if len(text[0]) <= LONGEST]
    if not texts:
        raise UserError(f"expected texts of at most {LONGEST} tokens, got none")
    random.Random(f"order {seed}").shuffle(texts)
    torch.manual_seed(seed)
    frozen = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(MODULES))
    model: Any = get_peft_model(frozen, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
    updates = -(-len(texts) // BATCH)
    for update in range(updates):
        batch = texts[update * BATCH : (update + 1) * BATCH]
        counted = sum(int((labels != -100).sum()) for _, labels in batch)
        total = 0.0
        for ids, labels in batch:
            loss = _sum_of_losses(model, ids, labels) / counted
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        share = (update + 1) / updates
        for group in optimizer.param_groups:
            group["lr"] = LR * min(share / WARMUP, (1 - share) / (1 - WARMUP))
        optimizer.step()
        optimizer.zero_grad()
        progress(update + 1, updates, total)
    for parameter in trained:
        parameter.data = parameter.data.bfloat16()
    model.peft_config["default"].base_model_name_or_path = BASE
    model.save_pretrained(out, save_embedding_layers=False)
    return len(texts)


def encode(tokenizer: Any, messages: Sequence[dict[str, str]]) -> tuple[Tensor, Tensor]:
    """Return token ids and labels of a conversation of two turns, int64 ``[T]`` each.

    The text is ChatML without a system turn. Labels are -100 outside the assistant's turn.
    """
    user, assistant = (message["content"] for message in messages)
    prompt = f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    after = tokenizer(f"{assistant}<|im_end|>\n", add_special_tokens=False)["input_ids"]
    return torch.tensor(before + after), torch.tensor([-100] * len(before) + after)


def _sum_of_losses(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    logits = model(input_ids=ids[None]).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
