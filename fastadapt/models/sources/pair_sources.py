"""Find the models of a pair: whole models or PEFT folders; read configurations and weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastadapt.errors import UserError
from fastadapt.io.names import typed_path
from fastadapt.models.architectures import ARCHITECTURES
from fastadapt.models.pretrained import (
    load_causal_lm,
    load_mlps,
    load_tokenizer,
    model_config,
    shipped_config,
)
from fastadapt.models.sources import peft_loading
from fastadapt.models.sources.checks import check_configs, tokenizer_notes
from fastadapt.models.sources.fingerprint import fingerprint, fingerprints
from fastadapt.models.sources.peft_folder import PeftFolder, choose_base, find_peft, is_quantised
from fastadapt.organism import resolve

if TYPE_CHECKING:
    from fastadapt.models.pair import PairConfig


def _folder(name: str) -> str:
    """Return the absolute path of a local folder; any other name unchanged."""
    if not name or not (path := typed_path(name, "pair")).is_dir():
        return name
    return os.path.abspath(path)


def _check_copy(peft: PeftFolder, base: str, notes: list[str]) -> list[str]:
    """Return ``notes`` on a base of another path than the adapter names; none if it is a copy.

    The weights of a quantised base are not compared.

    Raises:
        UserError: both are folders on this machine, with different files of weights.
    """
    named = peft.base or ""
    if not (os.path.isdir(named) and os.path.isdir(base)) or is_quantised(named):
        return notes
    if fingerprint(named, None) != fingerprint(base, None):
        raise UserError(
            f"pair.base is {base}, but target {peft.source} is an adapter of {named}, and the "
            f"files of their weights differ. Give that base (pair.base: {named})"
        )
    return []


def planned_config(name: str, revision: str | None, trust: bool) -> Any:
    """Return a model's configuration; that of a preset's model ships with this package."""
    return shipped_config(name) or model_config(name, revision, trust)


@dataclass(frozen=True)
class Sources:
    """Where a pair's models are read from.

    Attributes:
        typed: settings of the pair as given.
        config: settings of the pair, with the names of the embedded pair resolved, and the base.
        peft: the target as a PEFT folder; None if it is a whole model.
        notes: what a user should know about the choice of the base.
    """

    typed: PairConfig
    config: PairConfig
    peft: PeftFolder | None
    notes: list[str]

    @classmethod
    def find(cls, config: PairConfig) -> Sources:
        """Find the models of a pair.

        Raises:
            UserError: the base is missing, or is another one than a PEFT target names.
        """
        target, base = (_folder(resolve(name)) for name in (config.target, config.base))
        peft = None if shipped_config(target) else find_peft(target, config.target_revision)
        notes: list[str] = []
        revision = config.base_revision
        if peft is not None:
            base, notes = choose_base(peft, base)
            base, notes = _folder(base), notes and _check_copy(peft, base, notes)
            if not config.base:
                revision = revision or peft.settings.get("revision")
        elif not base:
            raise UserError(
                f"pair.base is missing: give the model that {config.target} was fine-tuned from"
            )
        if os.path.isdir(base) and find_peft(base, None) is not None:
            raise UserError(
                f"pair.base {base} is a PEFT adapter; expected the whole model under it. If it is "
                "the fine-tuned model, give it as pair.target; if the target was trained on top of "
                "it, merge it into its base (peft: merge_and_unload, save_pretrained) and give "
                "that folder"
            )
        resolved = replace(config, target=target, base=base, base_revision=revision)
        return cls(config, resolved, peft, notes)

    @property
    def is_own_base(self) -> bool:
        """Whether the target is its own base, as for adapters applied to the target."""
        config = self.config
        return (config.base, config.base_revision) == (config.target, config.target_revision)

    def check_differ(self) -> None:
        """Raise an error if target and base are known to have equal MLPs; read no weights.

        Raises:
            UserError: both are the same model, or a PEFT target changes no MLP.
        """
        if self.is_own_base:
            raise UserError(
                f"pair.target and pair.base are both {self.config.target}: there is no difference "
                "to learn. Give the model that the target was fine-tuned from (pair.base)"
            )
        if self.peft is not None:
            self.peft.check_mlps()

    def located(self) -> PairConfig:
        """Return the pair's settings with the base's name, and absolute paths of local folders.

        Names of the embedded pair and hub ids stay. A path that is not absolute could be taken for
        a hub id where the folder does not exist.
        """
        typed, config = self.typed, self.config

        def place(name: str) -> str:
            return name if resolve(name) != name else _folder(name)

        return replace(
            typed,
            target=place(typed.target),
            base=place(typed.base or config.base),
            base_revision=config.base_revision,
            tokenizer=None if typed.tokenizer is None else place(typed.tokenizer),
        )

    def configs(self, read: Callable[[str, str | None, bool], Any] = model_config) -> list[Any]:
        """Return transformers' configurations of target and base; ``read`` reads one of them.

        Raises:
            PairMismatchError: architecture or a size differs.
            UserError: a model cannot be read, or is quantised.
        """
        config, trust = self.config, self.config.trust_remote_code
        if self.peft is None:
            target = read(config.target, config.target_revision, trust)
        base = read(config.base, config.base_revision, trust)
        if self.peft is not None:
            target = peft_loading.peft_config(self.peft, config.base, base, trust)
        check_configs(target, base, trust)
        return [target, base]

    def tokenizer(self) -> Any:
        """Load the pair's tokenizer: ``pair.tokenizer``, or the target's."""
        config = self.config
        source, revision = config.target, config.target_revision
        if config.tokenizer is not None:
            source, revision = _folder(resolve(config.tokenizer)), None
        elif self.peft is not None and not self.peft.has_tokenizer():
            source, revision = config.base, config.base_revision
        return load_tokenizer(source, revision, config.trust_remote_code)

    def tokenizer_notes(self, tokenizer: Any) -> list[str]:
        """Return how the base's tokenizer differs from ``tokenizer``, as notes; none if equal."""
        config = self.config
        if self.is_own_base:
            return []
        try:
            base = load_tokenizer(config.base, config.base_revision, config.trust_remote_code)
        except UserError:
            return [f"base {config.base} has no tokenizer that can be read; the target's is used"]
        return tokenizer_notes(tokenizer, base)

    def fingerprints(self) -> dict[str, dict[str, str]]:
        """Return the fingerprints of both models."""
        config = self.config
        return fingerprints(
            {
                "target": (config.target, config.target_revision),
                "base": (config.base, config.base_revision),
            }
        )

    @property
    def has_separate_mlps(self) -> bool:
        """Whether the target's MLPs are weights of their own, which a pair may leave unread.

        A PEFT target shares its base's, and remote code may need its own class of the model.
        """
        return not (self.peft is not None or self.is_own_base or self.config.trust_remote_code)

    def models(
        self,
        target_config: Any,
        base_config: Any,
        attention: str,
        place: torch.device,
        target_mlps: bool = True,
    ) -> tuple[Any, nn.ModuleList]:
        """Load the target and the base's MLPs on ``place``; see :meth:`ModelPair.load`."""
        config, dtype = self.config, getattr(torch, self.config.dtype)
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
        with_mlps = target_mlps or not self.has_separate_mlps
        target = _target(config, target_config, attention, place, with_mlps)
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


def _target(
    config: PairConfig, target_config: Any, attention: str, place: torch.device, mlps: bool
) -> Any:
    """Load the target model on ``place``; raise if a weight is missing."""
    from transformers import AutoModelForCausalLM

    dtype, trust = getattr(torch, config.dtype), config.trust_remote_code
    if place.type == "meta":
        with place:
            model = AutoModelForCausalLM.from_config(
                target_config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust
            )
        paths = ARCHITECTURES[target_config.model_type]
        for block in () if mlps else getattr(getattr(model, paths.decoder), paths.layers):
            setattr(block, paths.mlp, None)
        return model.eval()
    return load_causal_lm(
        config.target,
        config.target_revision,
        device=place,
        dtype=dtype,
        attention=attention,
        trust=trust,
        mlps=mlps,
    )
