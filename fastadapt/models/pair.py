"""Load two checkpoints as a pair: the whole target and the base's MLPs; check that they match.

Only safetensors files are read. A weight missing from a checkpoint raises an error, since
transformers would initialise the weight at random. MLP weights in which target and base agree bit
for bit are in memory once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastadapt.errors import UserError
from fastadapt.io.names import typed_path
from fastadapt.models.adapted_mlp import AdaptedMLP
from fastadapt.models.architectures import ARCHITECTURES, Paths
from fastadapt.models.sources.low_rank import LowRankLinear, same_bits, shared_names
from fastadapt.models.sources.pair_sources import Sources


@dataclass(frozen=True)
class PairConfig:
    """Sources of the two models, and dtype, device and attention implementation to load them with.

    Args:
        target: the fine-tuned model: a local folder or a hub id, of a whole model or of a PEFT
            adapter (LoRA, rank-stabilised LoRA, DoRA).
        base: the model that the target was fine-tuned from: a local folder or a hub id. Empty: the
            base that the PEFT adapter names.
        target_revision, base_revision: branch, tag or commit on the hub.
        tokenizer: a local folder or a hub id, if the target's own tokenizer is not to be used.
        dtype: dtype of the frozen weights and the adapters' working copies: ``float32``,
            ``bfloat16``, ``float64`` or, except for training, ``float16``.
        attention: ``auto``, or transformers' name of an attention implementation: letters, digits
            and ``_``. Kernel repositories of the hub are refused, since they contain code.
        device: ``auto`` (the GPU if available, else the CPU), or torch's name of a device.
        trust_remote_code: run Python code that comes with a model. The user sets this option; a
            file never does.
        fused_blocks: on a GPU, run RMSNorms, gated products and rotary embeddings of frozen blocks
            as one kernel each (:mod:`fastadapt.kernels.frozen`). Without effect on a CPU.
        offload: while training, keep the frozen weights of the blocks in host memory and copy each
            block to the GPU when needed. Saves GPU memory and costs time.

    Raises:
        UserError: a value is not one of those above.
    """

    target: str
    base: str = ""
    target_revision: str | None = None
    base_revision: str | None = None
    tokenizer: str | None = None
    dtype: str = "float32"
    attention: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    offload: bool = False
    fused_blocks: bool = True

    def __post_init__(self) -> None:
        for role in ("target", "base", "tokenizer"):
            name = getattr(self, role)
            if role == "target" or name not in ("", None):
                typed_path(name, f"pair.{role}")  # a hub id also fits a path's length
        if self.dtype not in DTYPES:
            raise UserError(f"pair.dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if type(self.trust_remote_code) is not bool:  # transformers would ask at the terminal
            raise UserError(
                f"pair.trust_remote_code: expected true or false, got {self.trust_remote_code!r}"
            )
        if not isinstance(self.attention, str) or not _ATTENTION.fullmatch(self.attention):
            raise UserError(
                "pair.attention: expected auto, eager, sdpa, flash_attention_2 or another name of "
                f"letters, digits and _, got {self.attention!r:.80}"
            )

    @property
    def named(self) -> dict[str, str | None]:
        """Both models and their revisions, under the keys that result files use."""
        keys = ("target", "target_revision", "base", "base_revision")
        return {key: getattr(self, key) for key in keys}


DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


_ATTENTION = re.compile("[A-Za-z0-9_]+")


def choose_device(name: str) -> torch.device:
    """Return the torch device of a name; ``auto`` is the GPU if available, else the CPU.

    Raises:
        UserError: torch does not know the device, or no GPU is available for ``cuda``.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as e:
        message = f"pair.device: torch knows no device {name!r}; use auto, cuda or cpu"
        raise UserError(message) from e
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "pair.device is cuda, but torch finds no GPU; use cpu (--pair.device, or --device in "
            "commands that read a run)"
        )
    return device


def choose_attention(
    name: str, device: torch.device, dtype: torch.dtype, otherwise: str = "sdpa"
) -> tuple[str, str]:
    """Return the attention implementation to use, and the reason for the choice.

    ``otherwise`` is the implementation for ``auto`` where flash-attn cannot run.

    Raises:
        UserError: the named implementation is not installed.
    """
    from transformers.utils import (
        is_flash_attn_2_available,
        is_flash_attn_3_available,
        is_flash_attn_4_available,
    )

    # If these are not installed, transformers would run kernels from the hub instead.
    newer = {"3": is_flash_attn_3_available, "4": is_flash_attn_4_available}
    version = name.removeprefix("flash_attention_")
    if version != name and version != "2" and not (version in newer and newer[version]()):
        raise UserError(
            f"pair.attention is {name}, which is not installed; set pair.attention to sdpa"
        )
    if name == "flash_attention_2" and not is_flash_attn_2_available():
        raise UserError(
            "pair.attention is flash_attention_2, but flash-attn is not available; install it with "
            "pip install 'fastadapt[flash]', or set pair.attention to sdpa"
        )
    if name != "auto":
        return name, "set by pair.attention"
    if device.type != "cuda":
        return otherwise, f"flash-attn needs a GPU; the device is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return otherwise, f"flash-attn needs 16-bit weights; the dtype is {dtype}"
    if not is_flash_attn_2_available():
        return otherwise, "flash-attn is not installed (extra: flash)"
    return "flash_attention_2", "GPU, 16-bit weights and flash-attn are available"


@dataclass
class ModelPair:
    """A target model, its base's MLPs, and the tokenizer they share.

    Attributes:
        target: transformers' causal language model, in eval mode.
        base_mlps: the base's MLP modules, one per layer, on the target's device.
        tokenizer: the target's tokenizer.
        config: the settings that the pair was loaded with.
        paths: attribute names of the architecture's parts.
        revisions: commit of each model, if its source is a hub repository.
        notes: harmless differences, such as renamed added tokens.
        weights: fingerprint of each model's weights, by role
            (:mod:`fastadapt.models.sources.fingerprint`); empty if no weight was read.
        configs: the same of each model's configuration.
    """

    target: Any
    base_mlps: nn.ModuleList
    tokenizer: Any
    config: PairConfig
    paths: Paths
    revisions: dict[str, str | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    weights: dict[str, str] = field(default_factory=dict)
    configs: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(
        cls, config: PairConfig, *, into: torch.device | None = None, target_mlps: bool = True
    ) -> ModelPair:
        """Load and check both models.

        Args:
            config: the settings of the pair.
            into: device that the weights are loaded on; None is ``config.device``. On the meta
                device the models have shapes only, and no weight is read.
            target_mlps: load the target's own MLPs, without which its replacement model has no mode
                ``target``. Those of a PEFT target, which shares its base's, are loaded in any case.

        Raises:
            PairMismatchError: architecture or a size differs; the vocabulary and the tokenizer may.
            UserError: a source cannot be read or lacks a weight.
        """
        sources = Sources.find(config)
        config = sources.config
        device, dtype = choose_device(config.device), DTYPES[config.dtype]
        target_config, base_config = sources.configs()
        tokenizer = sources.tokenizer()
        paths = ARCHITECTURES[target_config.model_type]
        attention, _ = choose_attention(config.attention, device, dtype, paths.attention)
        place = into or device
        target, base_mlps = sources.models(
            target_config, base_config, attention, place, target_mlps
        )
        return cls(
            target=target,
            base_mlps=base_mlps,
            tokenizer=tokenizer,
            config=config,
            paths=paths,
            revisions={
                "target": getattr(target_config, "_commit_hash", None),
                "base": getattr(base_config, "_commit_hash", None),
            },
            notes=[*sources.notes, *sources.tokenizer_notes(tokenizer)],
            **({} if place.type == "meta" else sources.fingerprints()),
        )

    @property
    def fingerprints(self) -> dict[str, dict[str, str]]:
        """Fingerprints of both models, as the entries of a card."""
        return {"weights": self.weights, "configs": self.configs}

    @property
    def target_mlps(self) -> nn.ModuleList:
        """The target's MLP modules, one per layer, also if its blocks carry adapters."""
        blocks = getattr(getattr(self.target, self.paths.decoder), self.paths.layers)
        mlps: list[Any] = [getattr(block, self.paths.mlp) for block in blocks]
        mlps = [mlp.target if isinstance(mlp, AdaptedMLP) else mlp for mlp in mlps]
        return nn.ModuleList(mlps)

    def check_mlps_differ(self) -> None:
        """Check that fine-tuning changed an MLP weight.

        Raises:
            UserError: the MLPs of target and base are equal, bit for bit, low-rank parts that add
                nothing left out.
        """
        target = self.target_mlps
        low_rank = [part for part in target.modules() if isinstance(part, LowRankLinear)]
        if not all(part.is_plain for part in low_rank):
            return
        parts = {id(p) for each in low_rank for p in (each.lora_A, each.lora_B, each.gain)}
        ours = {name: p for name, p in target.named_parameters() if id(p) not in parts}
        theirs = dict(self.base_mlps.named_parameters())
        # Equal matrices are shared, apart from those that a PEFT folder saves as a whole.
        if ours.keys() == theirs.keys() and all(
            p is ours[name] or same_bits(p, ours[name]) for name, p in theirs.items()
        ):
            reason = "fine-tuning changed other parts only"
            if low_rank:
                reason = "the low-rank parts of the MLPs add nothing, as before a LoRA's training"
            raise UserError(
                f"the MLPs of target {self.config.target} and base {self.config.base} are equal, "
                f"bit for bit: {reason}. There is no MLP difference that adapters could learn"
            )

    @property
    def shared_mlps(self) -> list[str]:
        """Names of the base's MLP weights that are in memory once, as weights of the target too."""
        return shared_names(self.target_mlps, self.base_mlps)
