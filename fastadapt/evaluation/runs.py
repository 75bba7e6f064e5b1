"""What a run's folder says of itself: its name, its pair, what was trained and how."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from typing_extensions import NotRequired, TypedDict

from fastadapt.adapter.files import TRANSCODER
from fastadapt.errors import UserError
from fastadapt.io.documents import DocumentError, Name, read_yaml
from fastadapt.io.names import check_name, has_file, typed_path
from fastadapt.models.pair import PairConfig
from fastadapt.organism import resolve
from fastadapt.training.config import TRUST, recorded_trust

#: Names that no run may have: every pair has these. The target is no student, but generates too.
BUILT_IN = ("target", "base", "hybrid")


@dataclass(frozen=True)
class Student:
    """A model that is compared with the target, and what its run says of it.

    Attributes:
        name: ``base``, ``hybrid``, or the run's.
        kind: ``base``, ``hybrid``, ``transcoder``, ``mlp`` or ``norms``.
        run: folder of the run, of those that have one.
        sparsity, bridge: weights of these losses in its training.
        l0: active features per token and layer, as its run measured them on held-out data.
        tokens: that it was trained on.
        changed: what was done to its features since, the first first, in words.
    """

    name: str
    kind: str
    run: str | None = None
    sparsity: float | None = None
    bridge: float | None = None
    l0: float | None = None
    tokens: int | None = None
    changed: tuple[str, ...] = ()

    @property
    def variant(self) -> str:
        """``dense`` or ``no-bridge`` for the ablations of the adapter, ``changed`` where features
        of it were since; empty for all others."""
        if self.kind != "transcoder":
            return ""
        if self.changed:
            return "changed"
        return "dense" if self.sparsity == 0 else "no-bridge" if self.bridge == 0 else ""

    @property
    def what(self) -> str:
        """The student in words."""
        if self.kind == "transcoder":
            weight = "" if self.sparsity is None else f", λ={self.sparsity:g}"
            bridge = ", no bridge" if self.bridge == 0 and self.sparsity != 0 else ""
            return ", ".join([f"adapter{weight}{bridge}", *self.changed])
        return {
            "base": "the whole base model",
            "hybrid": "target with the base's MLPs",
            "mlp": "hybrid, MLPs fine-tuned",
            "norms": "hybrid, norms refit",
        }[self.kind]

    def plain(self) -> dict[str, Any]:
        """The same as a dict, for JSON."""
        return asdict(self)


class PairSection(TypedDict):
    """``pair`` of a run's ``config.yaml``: the fields of :class:`PairConfig`."""

    target: Name
    base: Name
    target_revision: NotRequired[Name | None]
    base_revision: NotRequired[Name | None]
    dtype: NotRequired[str]
    attention: NotRequired[str]
    device: NotRequired[str]
    trust_remote_code: NotRequired[bool]
    offload: NotRequired[bool]


class RunFile(TypedDict):
    """What of a run's ``config.yaml`` says which pair it is of."""

    pair: PairSection


def names_of(runs: Sequence[str | os.PathLike[str]], names: Sequence[str] | None) -> list[str]:
    """What the runs are called: as given, or as their folders.

    Raises:
        UserError: too few or too many names, one given twice, one that every pair has, or one that
            cannot be a file's.
    """
    if names is None:
        names = [Path(os.path.realpath(typed_path(run, "run"))).name for run in runs]
    if len(names) != len(runs):
        raise UserError(f"expected as many names as runs, got {len(names)} for {len(runs)}")
    for name in names:
        if name in BUILT_IN:
            raise UserError(f"a run may not be called {name!r}, which every pair has: name it")
        if not name or not all(c.isalnum() or c in "._-+=" for c in name) or name[0] == ".":
            raise UserError(
                f"a run's name: expected letters, digits and ._-+=, got {name!r} (--names)"
            )
        check_name(name, "a run's name (--names)")
        if names.count(name) > 1:
            which = ", ".join(str(run) for run, n in zip(runs, names, strict=True) if n == name)
            raise UserError(f"several runs are called {name!r} ({which}): name them (--names)")
    return list(names)


def pair_of(folder: Path, metadata: Mapping[str, Any]) -> PairConfig:
    """The pair of adapters: as their run's ``config.yaml`` has it, at the commits they name.

    ``metadata`` is of their card (:func:`fastadapt.models.trained_files.read_adapters`).

    Trust in the code of its models is not among what is read: see :func:`trusting`.
    """
    config = folder.parent / "config.yaml"
    named = {role: metadata.get(role) for role in ("target", "base")}
    values: dict[str, Any] = {role: name for role, name in named.items() if name is not None}
    if folder.name == "adapter" and has_file(config):
        try:
            of_run = read_yaml(config, RunFile)["pair"]
        except DocumentError as error:
            raise UserError(f"{config} is no run's configuration: {error}") from error
        ours = {role: of_run[role] for role in named}
        if named != ours:
            raise UserError(
                f"{folder}: these adapters are of another pair than their run: they name "
                f"{_shown(named)}, {config} {_shown(ours)}"
            )
        values = {key: value for key, value in of_run.items() if key != TRUST}
    known = {field.name for field in fields(PairConfig)}
    if not {"target", "base"} <= set(values) <= known:
        raise UserError(f"{folder}: expected a target and a base, got {dict(values)}")
    try:
        pair = PairConfig(**values)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    at = metadata.get("revisions") or {}
    return replace(
        pair,
        target=resolve(pair.target),
        base=resolve(pair.base),
        target_revision=at.get("target") or pair.target_revision,
        base_revision=at.get("base") or pair.base_revision,
    )


def trusting(pair: PairConfig, folder: Path, trust_remote_code: bool) -> PairConfig:
    """Return the pair of the adapters in ``folder``, trusted as was typed for this call.

    Raises:
        UserError: nothing was typed, and the run records that it was trained with code that comes
            with its models. Without that code it may be another model.
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


def _shown(pair: Mapping[str, Any]) -> str:
    return f"{pair['target']} and {pair['base']}"


def check_same(first: PairConfig, other: PairConfig, run: str, other_run: str) -> None:
    """Raise ``UserError``, naming both runs, where they are of two pairs or two dtypes."""

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
            f"{other_run}: expected a run of the pair of {run}, {_shown(asdict(first))}; "
            f"got one of {_shown(asdict(other))}"
        )
    if first.dtype != other.dtype:
        raise UserError(
            f"{other_run}: its pair was held in {other.dtype}, that of {run} in {first.dtype}; "
            "give the dtype to evaluate both in (--dtype)"
        )


def student_of(name: str, run: Path, card: Mapping[str, Any]) -> Student:
    """A run as a student: ``card`` is its ``fastadapt.json``."""
    metadata = card["metadata"]
    objective, measured = metadata.get("objective") or {}, metadata.get("measured") or {}
    return Student(
        name,
        "transcoder" if card["kind"] == TRANSCODER else card["kind"],
        str(run),
        sparsity=objective.get("sparsity"),
        bridge=objective.get("bridge"),
        l0=measured.get("l0_mean"),
        tokens=measured.get("tokens"),
        changed=tuple(map(_changed, metadata.get("interventions") or ())),
    )


def _changed(step: Mapping[str, Any]) -> str:
    """An entry of ``metadata.interventions`` (:mod:`fastadapt.interventions.files`) in words."""
    scale = "" if step.get("scale") is None else f" × {step['scale']:g}"
    return f"{step['kind']} {step['set']['name'] or 'set'} ({step['set']['size']:,}){scale}"
