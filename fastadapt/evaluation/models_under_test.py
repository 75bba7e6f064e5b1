"""Loads the models that are compared with a target: its base, the hybrid and trained runs.

All of them share one pair in memory. A run's adapters are read on first use. The base as a complete
model is in memory only inside :meth:`ModelSet.base`.
"""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastadapt.adapter.files import adapters_of
from fastadapt.data.rendered import Spec
from fastadapt.errors import UserError
from fastadapt.evaluation.runs import (
    BUILT_IN,
    ComparedModel,
    check_same_pair,
    read_pair,
    run_names,
    with_trust,
)
from fastadapt.io.atomic import digest_of_input
from fastadapt.io.names import typed_path
from fastadapt.models.pair import DTYPES
from fastadapt.models.pretrained import (
    load_causal_lm,
    load_tokenizer,
)
from fastadapt.models.replacement import ModelPair, PairConfig, ReplacementModel
from fastadapt.models.sources.checks import conflicting_id
from fastadapt.models.sources.fingerprint import (
    config_fingerprints,
    fingerprint,
    warn_of_changes,
)
from fastadapt.models.sources.pair_sources import Sources
from fastadapt.models.trained_files import load_adapters, read_adapters
from fastadapt.models.traversal import Stream, carrying


def load_base(pair: ModelPair) -> Any:
    """Load the base of a pair as a complete model, with the MLPs that the pair has in memory.

    Raises:
        UserError: see :func:`fastadapt.models.pretrained.load_causal_lm`.
    """
    config = pair.config
    base = load_causal_lm(
        config.base,
        config.base_revision,
        device=next(pair.base_mlps.parameters()).device,
        dtype=DTYPES[config.dtype],
        attention=pair.target.config._attn_implementation,
        trust=config.trust_remote_code,
        role="base",
    ).requires_grad_(False)
    blocks = getattr(getattr(base, pair.paths.decoder), pair.paths.layers)
    for block, mlp in zip(blocks, pair.base_mlps, strict=True):
        setattr(block, pair.paths.mlp, mlp)
    return base


class ModelSet:
    """Runs of one pair, with the pair's base and hybrid.

    Attributes:
        config: settings of the pair, with resolved names.
        compared: the models by name: ``base`` and ``hybrid``, then the runs in the order given.
        family: chat format of the first run's training data; None if not recorded.
    """

    def __init__(
        self,
        config: PairConfig,
        folders: Mapping[str, Path],
        compared: Mapping[str, ComparedModel],
        family: Spec | None = None,
        recorded: Mapping[str, Mapping[str, Any]] | None = None,
        target_mlps: bool = True,
    ) -> None:
        self.config = config
        self._target_mlps = target_mlps
        self.compared = dict(compared)
        self.family = family
        #: Sentences about models whose vocabulary is not the target's, by their name.
        self.notes: dict[str, str] = {}
        self._folders = dict(folders)
        self._recorded = dict(recorded or {})  # by run: the metadata of its card
        self._adapters: dict[str, nn.ModuleList] = {}

    @classmethod
    def open(
        cls,
        runs: Sequence[str | os.PathLike[str]],
        names: Sequence[str] | None = None,
        *,
        dtype: str | None = None,
        device: str | None = None,
        attention: str | None = None,
        trust_remote_code: bool = False,
        target_mlps: bool = True,
    ) -> ModelSet:
        """Read the settings and metadata of runs. Weights are loaded on first use.

        Args:
            runs: folders of finished runs, or of adapters.
            names: one name per run; default: the folders' names.
            dtype, device, attention: settings of the pair that replace those of the first run.
            trust_remote_code: run Python code that comes with the models.
            target_mlps: load the target's own MLPs; see :meth:`.ModelPair.load`.

        Raises:
            UserError: ``runs`` is empty; a run is not finished; a run was trained with remote code
                that is not trusted now; runs have different pairs or dtypes; a name occurs twice
                or is no valid file name.
        """
        if not runs:
            raise UserError("expected at least one run to evaluate, got none")
        folders = [adapters_of(run) for run in runs]
        names = run_names(runs, names)
        compared = {name: ComparedModel(name, name) for name in BUILT_IN if name != "target"}
        first: PairConfig | None = None
        family: Spec | None = None
        recorded: dict[str, Mapping[str, Any]] = {}
        for run, folder, name in zip(runs, folders, names, strict=True):
            card = read_adapters(folder)[1]
            pair = with_trust(read_pair(folder, card["metadata"]), folder, trust_remote_code)
            pair = pair if dtype is None else replace(pair, dtype=dtype)
            if first is None:
                first, family = pair, card["metadata"].get("family")
            check_same_pair(first, pair, str(runs[0]), str(run))
            recorded[str(run)] = card["metadata"]
            compared[name] = ComparedModel.from_card(name, typed_path(run, "run"), card)
        assert first is not None
        changed = {"device": device, "attention": attention}
        config = replace(first, **{k: v for k, v in changed.items() if v is not None})  # type: ignore[arg-type]
        of_runs = dict(zip(names, folders, strict=True))
        return cls(config, of_runs, compared, family, recorded, target_mlps)

    @property
    def runs(self) -> list[str]:
        """Names of the runs, in the order given."""
        return list(self._folders)

    def folder(self, name: str) -> Path:
        """Return the folder of a run's adapters."""
        return self._folders[name]

    @cached_property
    def model(self) -> ReplacementModel:
        """Base and target, loaded on first access. :meth:`replacement` sets the adapters."""
        pair = ModelPair.load(self.config, target_mlps=self._target_mlps)
        models = {"target": pair.config.target, "base": pair.config.base}
        for run, metadata in self._recorded.items():
            warn_of_changes(run, metadata, pair.fingerprints, models)
        model = ReplacementModel(pair, self._load(self.runs[0], pair))
        model.eval()
        return model

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the pair, read without the weights."""
        return self.model.pair.tokenizer if self._is_loaded else self._source_tokenizer

    def sizes(self, name: str) -> Any:
        """Return transformers' configuration of a model, read without the weights.

        Args:
            name: ``base``, or any other model, which has the target's configuration.
        """
        return self._configs[name == "base"]

    @property
    def _is_loaded(self) -> bool:
        return "model" in vars(self)

    @cached_property
    def _sources(self) -> Sources:
        return Sources.find(self.config)

    @cached_property
    def _source_tokenizer(self) -> Any:
        return self._sources.tokenizer()

    @cached_property
    def _configs(self) -> list[Any]:
        """Configurations of target and base."""
        return self._sources.configs()

    def adapters(self, name: str) -> nn.ModuleList:
        """Return a run's adapters on the pair's device, in the pair's dtype and in eval mode.

        Raises:
            UserError: no run has this name.
        """
        if name not in self._folders:
            raise UserError(f"run {name!r}: expected one of {', '.join(self.runs)}")
        return self._load(name, self.model.pair)

    def replacement(self, name: str) -> ReplacementModel:
        """Return :attr:`model` with this run's adapters. The next call replaces them."""
        self.model.set_adapters(self.adapters(name))
        return self.model

    def stream(self, name: str) -> Stream:
        """Return the stream of the hybrid or of a run. The base has no stream in the pair."""
        if name == "hybrid":
            return Stream("hybrid")
        return Stream("replacement", self.adapters(name))

    @contextmanager
    def generating(self, name: str) -> Iterator[Any]:
        """Yield a transformers model that generates as ``target``, ``base``, ``hybrid`` or a run.

        All but the base share one module, so do not use the model of an outer context inside an
        inner one.
        """
        if name == "base":
            with self.base() as base:
                yield base
        elif name in ("target", "hybrid"):
            with self.model.mode(name):  # type: ignore[arg-type]
                yield self.model.model
        else:
            with carrying(self.model, self.adapters(name)), self.model.mode("replacement"):
                yield self.model.model

    def base_obstacle(self, ids: Iterable[int]) -> str | None:
        """Return why the base cannot read token ids of the target's tokenizer; None if it can.

        The base reads the ids of the target, so ordinary tokens must have the same ids in both
        tokenizers, and the base's embedding must have a row for every id. It may have fewer rows
        than the target's, or more.
        """
        if self._tokenizer_obstacle is not None:
            return self._tokenizer_obstacle
        if (highest := max(ids, default=0)) < self._base_rows:
            return None
        token = self.tokenizer.convert_ids_to_tokens(highest)
        return (
            f"the texts contain token {highest} ({token!r}), and the base's embedding has "
            f"{self._base_rows} rows"
        )

    @cached_property
    def base_bos(self) -> str:
        """Text of the token with which the base's own tokenizer begins a text; empty without."""
        config = self.config
        try:
            base = load_tokenizer(config.base, config.base_revision, config.trust_remote_code)
        except UserError:
            return ""  # a base without a tokenizer
        ids = base("", verbose=False)["input_ids"]
        return str(base.bos_token) if ids and ids[0] == base.bos_token_id else ""

    @cached_property
    def _base_rows(self) -> int:
        return int(self.sizes("base").get_text_config().vocab_size)

    @cached_property
    def _tokenizer_obstacle(self) -> str | None:
        config = self._sources.config
        try:
            base = load_tokenizer(config.base, config.base_revision, config.trust_remote_code)
        except UserError:
            return None  # a base without a tokenizer, which reads the target's ids
        return conflicting_id(self.tokenizer, base)

    def reads_base(self, ids: Iterable[int]) -> bool:
        """Return whether the base can read ``ids``; note why not, or which tokens are compared."""
        reason = self.base_obstacle(ids)
        n_target = self.model.head.shape[0]
        if reason is not None:
            self.notes["base"] = f"The base is not measured: {reason}."
        elif n_target != self._base_rows:
            self.notes["base"] = (
                f"The target has logits for {n_target:,} tokens and the base for "
                f"{self._base_rows:,}: the base's KL is between their distributions over the "
                f"{min(n_target, self._base_rows):,} tokens that both have."
            )
        return reason is None

    @contextmanager
    def base(self) -> Iterator[Any]:
        """Yield the base as a complete model, with the MLPs of the pair; free it at exit.

        Raises:
            UserError: a call of the model gets an id for which its embedding has no row.
        """
        base = load_base(self.model.pair)
        base.get_input_embeddings().register_forward_pre_hook(self._check_ids)
        try:
            yield base
        finally:
            del base
            gc.collect()

    def _check_ids(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        if int(args[0].max()) >= self._base_rows:
            self.reads_base([int(args[0].max())])
            raise UserError(self.notes["base"])

    def fingerprint(self, name: str) -> str:
        """Return the SHA-256 of the weights and settings that this model's outputs depend on.

        Adapters are hashed completely, models by
        :func:`fastadapt.models.sources.fingerprint.fingerprint`. A configuration counts if it is
        not the one that a run records, so that runs without that record keep their fingerprints.
        """
        config, sha256 = self.config, hashlib.sha256()
        sha256.update(repr((name in BUILT_IN, config.dtype, config.trust_remote_code)).encode())
        for source, revision in (
            (config.target, config.target_revision),
            (config.base, config.base_revision),
        ):
            sha256.update(fingerprint(source, revision).encode())
        sha256.update("".join(self._changed_configs()).encode())
        for file in sorted(self._folders[name].iterdir()) if name in self._folders else ():
            if file.suffix == ".safetensors":
                sha256.update(f"{file.name} {digest_of_input(file)}".encode())
        return sha256.hexdigest()

    def _changed_configs(self) -> list[str]:
        """Return the fingerprints of configurations that are not those of a run's training."""
        config, recorded = self.config, [r.get("configs") or {} for r in self._recorded.values()]
        if not any(recorded):
            return []
        now = config_fingerprints(
            {
                "target": (config.target, config.target_revision),
                "base": (config.base, config.base_revision),
            }
        )
        return [
            f"{role} {digest}"
            for role, digest in now.items()
            if any(then.get(role) not in (None, digest) for then in recorded)
        ]

    def _load(self, name: str, pair: ModelPair) -> nn.ModuleList:
        if name not in self._adapters:
            weight = next(pair.base_mlps.parameters())
            adapters, _ = load_adapters(
                self._folders[name], device=weight.device, dtype=weight.dtype
            )
            self._adapters[name] = adapters.requires_grad_(False).eval()
        return self._adapters[name]
