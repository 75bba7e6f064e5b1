"""Load two checkpoints as a pair: the whole target and the base's MLPs; check that they match.

Only safetensors files are read. A weight missing from a checkpoint raises an error, since
transformers would initialise the weight at random. MLP weights in which target and base agree bit
for bit are in memory once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from fastadapt.errors import UserError
from fastadapt.io.names import typed_path
from fastadapt.models.adapted_mlp import AdaptedMLP
from fastadapt.models.pretrained import (
    ARCHITECTURES,
    Paths,
    load_causal_lm,
    load_mlps,
    load_tokenizer,
    model_config,
    shipped_config,
)
from fastadapt.models.sources import peft_loading
from fastadapt.models.sources.checks import (
    PairMismatchError,
    check_configs,
    check_tokenizers,
)
from fastadapt.models.sources.fingerprint import fingerprint
from fastadapt.models.sources.low_rank import shared_names
from fastadapt.models.sources.peft_folder import PeftFolder, choose_base, find_peft
from fastadapt.organism import resolve


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
            ``bfloat16``, ``float16`` or ``float64``.
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
        raise UserError("pair.device is cuda, but torch finds no GPU; use --pair.device cpu")
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
            f"pair.attention is {name}, which is not installed; use --pair.attention sdpa"
        )
    if name == "flash_attention_2" and not is_flash_attn_2_available():
        raise UserError(
            "pair.attention is flash_attention_2, but flash-attn is not available; install it with "
            "pip install 'fastadapt[flash]', or use --pair.attention sdpa"
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
    """

    target: Any
    base_mlps: nn.ModuleList
    tokenizer: Any
    config: PairConfig
    paths: Paths
    revisions: dict[str, str | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    weights: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, config: PairConfig, *, into: torch.device | None = None) -> ModelPair:
        """Load and check both models.

        Args:
            config: the settings of the pair.
            into: device that the weights are loaded on; None is ``config.device``. On the meta
                device the models have shapes only, and no weight is read.

        Raises:
            PairMismatchError: architecture, a size, the vocabulary or the tokenizer differs.
            UserError: a source cannot be read or lacks a weight.
        """
        sources = Sources.of(config)
        config = sources.config
        device, dtype = choose_device(config.device), DTYPES[config.dtype]
        target_config, base_config = sources.configs()
        tokenizer = sources.tokenizer()
        paths = ARCHITECTURES[target_config.model_type]
        attention, _ = choose_attention(config.attention, device, dtype, paths.attention)
        place = into or device
        target, base_mlps = sources.models(target_config, base_config, attention, place)
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
            weights={} if place.type == "meta" else sources.fingerprints(),
        )

    @property
    def target_mlps(self) -> nn.ModuleList:
        """The target's MLP modules, one per layer, also if its blocks carry adapters."""
        blocks = getattr(getattr(self.target, self.paths.decoder), self.paths.layers)
        mlps = [getattr(block, self.paths.mlp) for block in blocks]
        return nn.ModuleList(m.target if isinstance(m, AdaptedMLP) else m for m in mlps)

    @property
    def shared_mlps(self) -> list[str]:
        """Names of the base's MLP weights that are in memory once, as weights of the target too."""
        return shared_names(self.target_mlps, self.base_mlps)


@dataclass(frozen=True)
class Sources:
    """Where a pair's models are read from.

    Attributes:
        config: settings of the pair, with the names of the embedded pair resolved, and the base.
        peft: the target as a PEFT folder; None if it is a whole model.
        notes: what a user should know about the choice of the base.
    """

    config: PairConfig
    peft: PeftFolder | None
    notes: list[str]

    @classmethod
    def of(cls, config: PairConfig) -> Sources:
        """Find the models of a pair.

        Raises:
            UserError: the base is missing, or is another one than a PEFT target names.
        """
        target, base = resolve(config.target), resolve(config.base)
        peft = None if shipped_config(target) else find_peft(target, config.target_revision)
        notes: list[str] = []
        revision = config.base_revision
        if peft is not None:
            base, notes = choose_base(peft, base)
            if not config.base:
                revision = revision or peft.settings.get("revision")
        elif not base:
            raise UserError(
                f"pair.base is missing: give the model that {config.target} was fine-tuned from"
            )
        config = replace(config, target=target, base=base, base_revision=revision)
        return cls(config, peft, notes)

    @property
    def is_own_base(self) -> bool:
        """Whether the target is its own base, as for adapters applied to the target."""
        config = self.config
        return (config.base, config.base_revision) == (config.target, config.target_revision)

    def configs(self, read: Callable[[str, str | None, bool], Any] = model_config) -> list[Any]:
        """Return transformers' configurations of target and base; ``read`` reads one of them.

        Raises:
            PairMismatchError: architecture or a size differs.
            UserError: a model cannot be read, or is quantised.
        """
        config, trust = self.config, self.config.trust_remote_code
        base = read(config.base, config.base_revision, trust)
        if self.peft is None:
            target = read(config.target, config.target_revision, trust)
        else:
            target = peft_loading.peft_config(self.peft, config.base, base, trust)
        check_configs(target, base)
        return [target, base]

    def tokenizer(self) -> Any:
        """Load the pair's tokenizer: ``pair.tokenizer``, or the target's."""
        config = self.config
        source, revision = config.target, config.target_revision
        if config.tokenizer is not None:
            source, revision = resolve(config.tokenizer), None
        elif self.peft is not None and not self.peft.has_tokenizer():
            source, revision = config.base, config.base_revision
        return load_tokenizer(source, revision, config.trust_remote_code)

    def tokenizer_notes(self, tokenizer: Any) -> list[str]:
        """Return how the base's tokenizer differs; the base needs none, but may be a wrong one."""
        config = self.config
        if self.is_own_base:
            return []
        try:
            base = load_tokenizer(config.base, config.base_revision, config.trust_remote_code)
            return check_tokenizers(tokenizer, base)
        except PairMismatchError as error:
            return [str(error)]
        except UserError:
            return [f"base {config.base} has no tokenizer that can be read; the target's is used"]

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of each model's weights, by role."""
        config = self.config
        return {
            "target": fingerprint(config.target, config.target_revision),
            "base": fingerprint(config.base, config.base_revision),
        }

    def models(
        self, target_config: Any, base_config: Any, attention: str, place: torch.device
    ) -> tuple[Any, nn.ModuleList]:
        """Load the target and the base's MLPs on ``place``; see :meth:`ModelPair.load`."""
        config, dtype = self.config, DTYPES[self.config.dtype]
        trust = config.trust_remote_code
        if self.peft is not None:
            if place.type == "meta":
                return peft_loading.empty_pair(self.peft, target_config, attention, dtype, trust)
            return peft_loading.load_pair(
                self.peft,
                config.base,
                config.base_revision,
                target_config,
                device=place,
                dtype=dtype,
                attention=attention,
                trust=trust,
            )
        target = _target(config, target_config, attention, place)
        paths = ARCHITECTURES[target_config.model_type]
        if self.is_own_base:
            blocks = getattr(getattr(target, paths.decoder), paths.layers)
            return target, nn.ModuleList(getattr(block, paths.mlp) for block in blocks)
        base_mlps = load_mlps(
            config.base,
            config.base_revision,
            base_config,
            device=place,
            dtype=dtype,
            trust=trust,
            beside=target,
        )
        return target, base_mlps


def _target(config: PairConfig, target_config: Any, attention: str, place: torch.device) -> Any:
    """Load the target model on ``place``; raise if a weight is missing."""
    from transformers import AutoModelForCausalLM

    dtype, trust = DTYPES[config.dtype], config.trust_remote_code
    if place.type == "meta":
        with place:
            model = AutoModelForCausalLM.from_config(
                target_config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust
            )
        return model.eval()
    return load_causal_lm(
        config.target,
        config.target_revision,
        device=place,
        dtype=dtype,
        attention=attention,
        trust=trust,
    )
