"""The models that are compared with a target: its base, the hybrid, and what runs have trained.

All of them share one pair in memory; a run adds its adapters, which are read when they are first
asked for, and the base as a whole model is there only while it is in use.
"""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from fastadapt.adapter.files import adapters_of
from fastadapt.errors import UserError
from fastadapt.evaluation.runs import (
    BUILT_IN,
    Student,
    check_same,
    names_of,
    pair_of,
    student_of,
    trusting,
)
from fastadapt.io.atomic import digest_of_input
from fastadapt.io.names import typed_path
from fastadapt.models.pair import DTYPES
from fastadapt.models.pretrained import load_causal_lm, tensor_files
from fastadapt.models.replacement import ModelPair, PairConfig, ReplacementModel
from fastadapt.models.trained_files import load_adapters, read_adapters
from fastadapt.models.traversal import Stream, carrying

_ENDS = 1 << 20  # bytes at either end of a weight file that tell it from another


class Students:
    """Runs of one pair, opened to be measured.

    Attributes:
        config: of the pair, names resolved.
        students: by name: ``base`` and ``hybrid``, then the runs in the order given.
        family: how conversations were rendered in training, where the first run says so.
    """

    def __init__(
        self, config: PairConfig, folders: Mapping[str, Path], students: Mapping[str, Student]
    ) -> None:
        self.config = config
        self.students = dict(students)
        self.family: str | None = None
        self._folders = dict(folders)
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
    ) -> Students:
        """Read what the runs say of themselves; no weight is read yet.

        Args:
            runs: folders of finished runs, or of adapters.
            names: one per run; the folders' names if not given.
            dtype, device, attention: of the pair, in place of the first run's settings.
            trust_remote_code: run Python code that comes with the models.

        Raises:
            UserError: no run, one that is not finished, one trained with code of its models where
                that is not trusted now, runs of several pairs or dtypes, a name
                given twice or one that cannot be a file's.
        """
        if not runs:
            raise UserError("expected at least one run to evaluate, got none")
        folders = [adapters_of(run) for run in runs]
        names = names_of(runs, names)
        students = {name: Student(name, name) for name in BUILT_IN if name != "target"}
        first: PairConfig | None = None
        family: str | None = None
        for run, folder, name in zip(runs, folders, names, strict=True):
            card = read_adapters(folder)[1]
            pair = trusting(pair_of(folder, card["metadata"]), folder, trust_remote_code)
            pair = pair if dtype is None else replace(pair, dtype=dtype)
            if first is None:
                first, family = pair, card["metadata"].get("family")
            check_same(first, pair, str(runs[0]), str(run))
            students[name] = student_of(name, typed_path(run, "run"), card)
        assert first is not None
        changed = {"device": device, "attention": attention}
        config = replace(first, **{k: v for k, v in changed.items() if v is not None})  # type: ignore[arg-type]
        opened = cls(config, dict(zip(names, folders, strict=True)), students)
        opened.family = family
        return opened

    @property
    def runs(self) -> list[str]:
        """Names of the students that were trained, in the order given."""
        return list(self._folders)

    def folder(self, name: str) -> Path:
        """Where a run's adapters are read from."""
        return self._folders[name]

    @cached_property
    def model(self) -> ReplacementModel:
        """The pair, loaded when it is first asked for; it carries some run's adapters."""
        pair = ModelPair.load(self.config)
        model = ReplacementModel(pair, self._load(self.runs[0], pair))
        model.eval()
        return model

    @property
    def tokenizer(self) -> Any:
        """The pair's."""
        return self.model.pair.tokenizer

    def adapters(self, name: str) -> nn.ModuleList:
        """A run's adapters on the pair's device and in its dtype, in ``eval()``.

        Raises:
            UserError: no run has this name.
        """
        if name not in self._folders:
            raise UserError(f"no run is called {name!r}; there are {', '.join(self.runs)}")
        return self._load(name, self.model.pair)

    def replacement(self, name: str) -> ReplacementModel:
        """The pair with this run's adapters in it; it keeps them until it is asked for others."""
        self.model.set_adapters(self.adapters(name))
        return self.model

    def stream(self, name: str) -> Stream:
        """How a student's blocks are called: the hybrid, or a run. The base has its own blocks."""
        if name == "hybrid":
            return Stream("hybrid")
        return Stream("replacement", self.adapters(name))

    @contextmanager
    def generating(self, name: str) -> Iterator[Any]:
        """transformers' model, which generates as ``target``, ``base``, ``hybrid`` or a run.

        For as long as the context lasts; of two at a time only the inner one is what it says.
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

    @contextmanager
    def base(self) -> Iterator[Any]:
        """The base as a whole model, which shares its MLPs with the pair; let go of at the end."""
        pair, config = self.model.pair, self.config
        base = load_causal_lm(
            config.base,
            config.base_revision,
            device=self.model.device,
            dtype=DTYPES[config.dtype],
            attention=pair.target.config._attn_implementation,
            trust=config.trust_remote_code,
            role="base",
        ).requires_grad_(False)
        blocks = getattr(getattr(base, pair.paths.decoder), pair.paths.layers)
        for block, mlp in zip(blocks, pair.base_mlps, strict=True):
            setattr(block, pair.paths.mlp, mlp)
        try:
            yield base
        finally:
            del base, blocks
            gc.collect()

    def fingerprint(self, name: str) -> str:
        """SHA-256 of what this student's outputs depend on beside the texts: models, adapters.

        Of the models' weight files, size and both ends are read; of adapters, everything.
        """
        config, sha256 = self.config, hashlib.sha256()
        sha256.update(repr((name in BUILT_IN, config.dtype, config.trust_remote_code)).encode())
        for source, revision in (
            (config.target, config.target_revision),
            (config.base, config.base_revision),
        ):
            sha256.update(self._ends(source, revision))
        for file in sorted(self._folders[name].iterdir()) if name in self._folders else ():
            if file.suffix == ".safetensors":
                sha256.update(f"{file.name} {digest_of_input(file)}".encode())
        return sha256.hexdigest()

    def _ends(self, source: str, revision: str | None) -> bytes:
        sha256 = hashlib.sha256()
        for name, path in sorted(tensor_files(source, revision).items()):
            size = path.stat().st_size
            with path.open("rb") as file:
                start = file.read(_ENDS)
                file.seek(max(0, size - _ENDS))
                sha256.update(f"{name} {size}".encode() + start + file.read())
        return sha256.digest()

    def _load(self, name: str, pair: ModelPair) -> nn.ModuleList:
        if name not in self._adapters:
            weight = next(pair.base_mlps.parameters())
            adapters, _ = load_adapters(
                self._folders[name], device=weight.device, dtype=weight.dtype
            )
            self._adapters[name] = adapters.requires_grad_(False).eval()
        return self._adapters[name]
