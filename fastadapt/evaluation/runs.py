"""Reads the names, pairs and training facts of runs from their folders."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from typing_extensions import NotRequired, TypedDict

from fastadapt.adapter.files import TRANSCODER
from fastadapt.errors import UserError
from fastadapt.io.documents import DocumentError, Name, read_yaml
from fastadapt.io.names import check_name, has_file, typed_path
from fastadapt.models.pair import PairConfig
from fastadapt.organism import resolve
from fastadapt.training.config import (
    FREE_ON_RESUME,
    TRUST,
    load_config,
    recorded_trust,
    to_dict,
)

#: Names of models that every pair has. No run may have one of them.
BUILT_IN = ("target", "base", "hybrid")


@dataclass(frozen=True)
class ComparedModel:
    """A model that is compared with the target.

    Attributes:
        name: ``base``, ``hybrid``, or the name of the run.
        kind: ``base``, ``hybrid``, ``transcoder``, or a baseline's
            (:mod:`fastadapt.models.baselines`).
        run: folder of the run; None for the base and the hybrid.
        sparsity, bridge: weights of these losses in the training; λ at its end if it varied.
        l0: active features per token and layer, measured by the run on held-out data.
        tokens: number of tokens of the training.
        changed: interventions on the features after the training, oldest first, in words.
        whole_mlp: whether transcoders compute the whole MLP, without the base's beside them.
        seed: seed of the training.
        recipe: digest of the training's configuration without the seed; None if not recorded. Runs
            with one recipe differ by their seeds only.
        activation, k: of transcoders, as in :class:`fastadapt.adapter.module.AdapterConfig`.
        penalty, penalty_scale: what λ weighs, as in the objective's settings.
    """

    name: str
    kind: str
    run: str | None = None
    sparsity: float | None = None
    bridge: float | None = None
    l0: float | None = None
    tokens: int | None = None
    changed: tuple[str, ...] = ()
    whole_mlp: bool = False
    seed: int | None = None
    recipe: str | None = None
    activation: str = "relu"
    k: float | None = None
    penalty: str = "l1"
    penalty_scale: float | None = None

    @property
    def variant(self) -> str:
        """``dense``, ``no-bridge`` or ``whole-mlp`` for another training of transcoders,
        ``changed`` for an adapter with interventions, otherwise empty."""
        if self.kind != "transcoder":
            return ""
        if self.changed:
            return "changed"
        if self.whole_mlp:
            return "whole-mlp"
        if self._is_dense:
            return "dense"
        return "no-bridge" if self.bridge == 0 else ""

    @property
    def transfer_obstacle(self) -> str | None:
        """Why features of the run cannot be added to the target; None if they can."""
        if not self.whole_mlp:
            return None
        return (
            "No features are added to the target: these transcoders compute the whole output of an "
            "MLP (adapter.base_mlp is false)."
        )

    @property
    def _is_dense(self) -> bool:
        """Whether neither a penalty nor an activation makes the transcoders sparse."""
        return self.sparsity == 0 and self.k is None

    @property
    def description(self) -> str:
        """Description of the model in words, for tables."""
        if self.kind == "transcoder":
            words = ["transcoder of the whole MLP" if self.whole_mlp else "adapter"]
            if self.activation != "relu":
                words.append(
                    self.activation if self.k is None else f"{self.activation} k={self.k:g}"
                )
            if self.penalty != "l1":
                words.append(self.penalty)
            if self.sparsity is not None and (self.sparsity or self.k is None):
                words.append(f"λ={self.sparsity:.3g}")
            if self.bridge == 0 and not self._is_dense:
                words.append("no bridge")
            return ", ".join([*words, *self.changed])
        return {
            "base": "the whole base model",
            "hybrid": "target with the base's MLPs",
            "mlp": "hybrid, MLPs fine-tuned",
            "norms": "hybrid, norms refit",
            "bias": "hybrid, a bias per layer",
            "lora": "hybrid, low-rank update of MLPs",
        }[self.kind]

    @classmethod
    def from_card(cls, name: str, run: Path, card: Mapping[str, Any]) -> ComparedModel:
        """Return the model of a run. ``card`` is the contents of its ``fastadapt.json``."""
        metadata = card["metadata"]
        is_transcoder = card["kind"] == TRANSCODER
        objective, measured = metadata.get("objective") or {}, metadata.get("measured") or {}
        return cls(
            name,
            "transcoder" if is_transcoder else card["kind"],
            str(run),
            sparsity=measured.get("sparsity_weight", objective.get("sparsity")),
            bridge=objective.get("bridge"),
            l0=measured.get("l0_mean"),
            tokens=measured.get("tokens"),
            changed=tuple(map(_describe_change, metadata.get("interventions") or ())),
            whole_mlp=is_transcoder and not card["adapter"].base_mlp,
            seed=seed if isinstance(seed := metadata.get("seed"), int) else None,
            recipe=None if metadata.get("interventions") else _recipe(run),
            activation=card["adapter"].activation if is_transcoder else "relu",
            k=card["adapter"].k if is_transcoder else None,
            penalty=objective.get("penalty", "l1"),
            penalty_scale=objective.get("penalty_scale"),
        )


def seed_groups(models: Iterable[ComparedModel]) -> dict[str, list[str]]:
    """Group runs that differ only by their seed: names of runs, by the name of the first.

    Groups have two runs or more. Of runs with equal seeds, the first counts.

    Example:
        >>> runs = [ComparedModel(f"run{i}", "mlp", seed=i % 2, recipe="a") for i in range(3)]
        >>> seed_groups([*runs, ComparedModel("other", "mlp", seed=0, recipe="b")])
        {'run0': ['run0', 'run1']}
    """
    by_recipe: dict[str, dict[int, str]] = {}
    for model in models:
        if model.recipe is not None and model.seed is not None:
            by_recipe.setdefault(model.recipe, {}).setdefault(model.seed, model.name)
    groups = (list(by_seed.values()) for by_seed in by_recipe.values())
    return {names[0]: names for names in groups if len(names) > 1}


class PairSection(TypedDict):
    """Section ``pair`` of a run's ``config.yaml``: the fields of :class:`PairConfig`."""

    target: Name
    base: Name
    target_revision: NotRequired[Name | None]
    base_revision: NotRequired[Name | None]
    tokenizer: NotRequired[Name | None]
    dtype: NotRequired[str]
    attention: NotRequired[str]
    device: NotRequired[str]
    trust_remote_code: NotRequired[bool]
    offload: NotRequired[bool]


class RunFile(TypedDict):
    """The section of a run's ``config.yaml`` that names its pair."""

    pair: PairSection


def run_names(runs: Sequence[str | os.PathLike[str]], names: Sequence[str] | None) -> list[str]:
    """Return one name per run: ``names``, or the folders' names.

    Raises:
        UserError: the number of names differs from the number of runs; a name occurs twice, is one
            of ``BUILT_IN``, or is no valid file name.
    """
    if names is None:
        names = [Path(os.path.realpath(typed_path(run, "run"))).name for run in runs]
    if len(names) != len(runs):
        raise UserError(
            f"--names: expected as many names as runs, got {len(names)} for {len(runs)} runs"
        )
    for name in names:
        if name in BUILT_IN:
            raise UserError(
                f"a run's name: {name!r} is already the name of a model of every pair; rename the "
                "folder, or pass --names to fastadapt eval"
            )
        if not name or not all(c.isalnum() or c in "._-+=" for c in name) or name[0] == ".":
            raise UserError(
                f"a run's name: expected letters, digits and ._-+=, and no leading dot, got "
                f"{name!r}; rename the folder, or pass --names to fastadapt eval"
            )
        check_name(name, "a run's name (--names)")
        if names.count(name) > 1:
            which = ", ".join(str(run) for run, n in zip(runs, names, strict=True) if n == name)
            raise UserError(
                f"several runs have the name {name!r} ({which}); pass --names, a name for each run"
            )
    return list(names)


def read_pair(folder: Path, metadata: Mapping[str, Any]) -> PairConfig:
    """Return the settings of the pair that adapters belong to, at the commits that they name.

    The settings come from the run's ``config.yaml`` if ``folder`` is in a run. Trust in remote code
    is not read: see :func:`with_trust`.

    Args:
        folder: folder of the adapters.
        metadata: metadata of their card, see :func:`fastadapt.models.trained_files.read_adapters`.

    Raises:
        UserError: the run's configuration cannot be read, names another pair than the adapters, or
            has unknown settings.
    """
    config = folder.parent / "config.yaml"
    words = metadata.get("tokenizer")
    named = {role: metadata.get(role) for role in ("target", "base")}
    values: dict[str, Any] = {role: name for role, name in named.items() if name is not None}
    values |= {} if words is None else {"tokenizer": words}
    if folder.name == "adapter" and has_file(config):
        try:
            run_pair = read_yaml(config, RunFile)["pair"]
        except DocumentError as error:
            raise UserError(
                f"{config}: expected the configuration that `fastadapt train` wrote: {error}"
            ) from error
        expected = {role: run_pair[role] for role in named}
        if named != expected:
            raise UserError(
                f"{folder}: expected adapters of the pair in {config}, {_pair_text(expected)}; "
                f"got adapters of {_pair_text(named)}"
            )
        values = {key: value for key, value in run_pair.items() if key != TRUST}
    known = {field.name for field in fields(PairConfig)}
    if not {"target", "base"} <= set(values) <= known:
        imported = "imported" in metadata and "target" not in values
        hint = "; import the set again and name its model (--model)" if imported else ""
        raise UserError(
            f"{folder}: expected the names of a target and a base in fastadapt.json or "
            f"config.yaml, got {dict(values) or 'neither'}{hint}"
        )
    try:
        pair = PairConfig(**values)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    revisions = metadata.get("revisions") or {}
    return replace(
        pair,
        target=resolve(pair.target),
        base=resolve(pair.base),
        target_revision=revisions.get("target") or pair.target_revision,
        base_revision=revisions.get("base") or pair.base_revision,
    )


def with_trust(pair: PairConfig, folder: Path, trust_remote_code: bool) -> PairConfig:
    """Return ``pair`` with ``trust_remote_code`` set.

    Raises:
        UserError: ``trust_remote_code`` is false, and the run of the adapters in ``folder`` was
            trained with remote code. Without that code the models may compute something else.
    """
    config = folder.parent / "config.yaml"
    in_run = folder.name == "adapter" and has_file(config)
    if not trust_remote_code and in_run and recorded_trust(config):
        raise UserError(
            f"{config.parent}: this run was trained with code that comes with {pair.target} or "
            f"{pair.base} (pair.{TRUST} in its {config.name}). To run that code again, type "
            "--trust_remote_code"
        )
    return replace(pair, trust_remote_code=trust_remote_code)


def _pair_text(pair: Mapping[str, Any]) -> str:
    return f"{pair['target']} and {pair['base']}"


def check_same_pair(first: PairConfig, other: PairConfig, run: str, other_run: str) -> None:
    """Raise ``UserError`` if two runs have different pairs or dtypes."""

    def models(pair: PairConfig) -> dict[str, Any]:
        return {
            role: (os.path.realpath(name) if os.path.isdir(name) else name, revision)
            for role, name, revision in (
                ("target", pair.target, pair.target_revision),
                ("base", pair.base, pair.base_revision),
            )
        }

    if models(first) != models(other):
        raise UserError(
            f"{other_run}: expected a run of the pair of {run}, {_pair_text(asdict(first))}; "
            f"got one of {_pair_text(asdict(other))}"
        )
    if first.dtype != other.dtype:
        raise UserError(
            f"{other_run}: expected a pair in {first.dtype}, as in {run}, got {other.dtype}; "
            "pass --dtype to evaluate both in one dtype"
        )


def _recipe(run: Path) -> str | None:
    """Return a digest of a run's configuration, without the seed and what affects no weight."""
    if not has_file(run / "config.yaml"):
        return None
    values: Mapping[str, Mapping[str, Any]]
    try:  # with the defaults of settings that the run's version did not have
        values = to_dict(load_config(run / "config.yaml"))
    except UserError:  # a setting that this version does not have
        values = read_yaml(run / "config.yaml", dict[str, dict[str, Any]])
    recipe = {
        f"{component}.{key}": value
        for component, keys in values.items()
        for key, value in keys.items()
        if f"{component}.{key}" not in FREE_ON_RESUME | {"run.seed"}
    }
    return sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()


def _describe_change(step: Mapping[str, Any]) -> str:
    """Describe an entry of ``metadata.interventions``, see :mod:`fastadapt.interventions.files`."""
    scale = "" if step.get("scale") is None else f" × {step['scale']:g}"
    return f"{step['kind']} {step['set']['name'] or 'set'} ({step['set']['size']:,}){scale}"
