"""Named sets of an adapter's features: made by selection, combined, kept in the store.

A set is one JSON file, ``sets/NAME.json`` in the store: the adapter that it is of (SHA-256, see
:func:`fastadapt.features.store.store.adapter_digest`), its shape, how the set was made, and the
pairs (layer, feature), sorted, both counted from 0.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from typing_extensions import NotRequired, TypedDict

from fastadapt.errors import UserError
from fastadapt.features.store.store import Layers, PerLayer, Store, writing
from fastadapt.io.atomic import disk_errors, make_folder, replacing
from fastadapt.io.documents import Count, check, read_json
from fastadapt.io.names import has_file, inside, typed_path

FOLDER = "sets"
SCHEMA_VERSION = 1
Pair = tuple[int, int]


@dataclass(frozen=True)
class FeatureSet:
    """Features of one adapter.

    ``a | b``, ``a & b``, ``a - b`` and ``~a`` are sets of the same adapter; :meth:`of` sorts.

    Attributes:
        adapter: SHA-256 of the adapter.
        shape: its layers, and features per layer.
        features: distinct pairs (layer, feature), sorted.
        made: how, as an expression.
        name: under which it is kept; empty where it is not.
    """

    adapter: str
    shape: tuple[int, int]
    features: tuple[Pair, ...]
    made: str
    name: str = ""

    def __post_init__(self) -> None:
        n_layers, n_features = self.shape
        for layer, feature in self.features:
            if not (0 <= layer < n_layers and 0 <= feature < n_features):
                raise UserError(
                    f"{self.told}: expected features of layers 0 to {n_layers - 1} and numbers 0 "
                    f"to {n_features - 1}, got feature {feature} of layer {layer}"
                )
        if any(a >= b for a, b in zip(self.features, self.features[1:], strict=False)):
            raise UserError(f"{self.told}: expected distinct features, sorted by layer and number")

    @classmethod
    def of(
        cls, pairs: Iterable[Pair], *, adapter: str, shape: tuple[int, int], made: str
    ) -> FeatureSet:
        """A set of pairs in any order, some of which may occur twice."""
        return cls(adapter, shape, tuple(sorted(set(pairs))), made)

    @property
    def told(self) -> str:
        """The set in words, for messages."""
        return f"set {self.name!r}" if self.name else f"the set {self.made}"

    def __len__(self) -> int:
        return len(self.features)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.features)

    def __contains__(self, pair: object) -> bool:
        return pair in self._pairs()

    def __or__(self, other: FeatureSet) -> FeatureSet:
        return self._combined(other, self._pairs() | other._pairs(), "|")

    def __and__(self, other: FeatureSet) -> FeatureSet:
        return self._combined(other, self._pairs() & other._pairs(), "&")

    def __sub__(self, other: FeatureSet) -> FeatureSet:
        return self._combined(other, self._pairs() - other._pairs(), "-")

    def __invert__(self) -> FeatureSet:
        n_layers, n_features = self.shape
        every = {(layer, i) for layer in range(n_layers) for i in range(n_features)}
        return FeatureSet.of(
            every - self._pairs(), adapter=self.adapter, shape=self.shape, made=f"~({self.made})"
        )

    def rows(self, layer: int) -> list[int]:
        """Its features in a layer."""
        return [feature for at, feature in self.features if at == layer]

    def per_layer(self) -> list[int]:
        """How many it has in each layer."""
        counts = [0] * self.shape[0]
        for layer, _ in self.features:
            counts[layer] += 1
        return counts

    def not_empty(self) -> FeatureSet:
        """The set itself.

        Raises:
            UserError: there is no feature in it.
        """
        if not self.features:
            raise UserError(f"{self.told} is empty: no feature of the adapter is in it")
        return self

    def digest(self) -> str:
        """SHA-256 of the features and the adapter that they are of."""
        told = [self.adapter, list(self.shape), list(self.features)]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def write(self, path: Path) -> None:
        """Write the set as JSON; the folder of ``path`` is there."""
        plain = {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "adapter": self.adapter,
            "n_layers": self.shape[0],
            "n_features": self.shape[1],
            "made": self.made,
            "size": len(self),
            "features": self.features,
        }
        with replacing(path) as staged:
            staged.write_text(json.dumps(plain, ensure_ascii=False) + "\n", encoding="utf-8")

    def _pairs(self) -> frozenset[Pair]:
        return frozenset(self.features)

    def _combined(self, other: FeatureSet, pairs: Iterable[Pair], sign: str) -> FeatureSet:
        if (self.adapter, self.shape) != (other.adapter, other.shape):
            raise UserError(f"{self.told} and {other.told} are of two adapters")
        made = f"({self.made}) {sign} ({other.made})"
        return FeatureSet.of(pairs, adapter=self.adapter, shape=self.shape, made=made)


class _Set(TypedDict):
    name: str
    adapter: str
    n_layers: Layers
    n_features: PerLayer
    made: str
    size: NotRequired[Count]
    features: list[tuple[Count, Count]]


def read_set(path: Path) -> FeatureSet:
    """The set in a JSON file.

    Raises:
        UserError: it cannot be read, is no set, or is an empty one.
    """
    plain = read_json(path)
    found = plain.get("schema_version") if isinstance(plain, dict) else None
    if type(found) is not int or found != SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema_version is {found!r}, this fastadapt reads {SCHEMA_VERSION}"
        )
    check(plain, _Set, str(path))
    shape = plain["n_layers"], plain["n_features"]
    pairs = tuple((layer, feature) for layer, feature in plain["features"])
    try:
        features = FeatureSet(plain["adapter"], shape, pairs, plain["made"], plain["name"])
        features.not_empty()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if (size := plain.get("size", len(features))) != len(features):
        raise UserError(f"{path}: size: it says {size:,} features, and has {len(features):,}")
    return features


def save_set(store: Store, features: FeatureSet, name: str, *, overwrite: bool = False) -> Path:
    """Keep a set in the store as ``name``; returns its file.

    Raises:
        UserError: the set is empty or of another adapter than the store, the name cannot be a
            file's, another set has it (without ``overwrite``), or another process writes there.
        RunError: the store cannot be written.
    """
    path = _path(store, name)
    _check_of(store, features.not_empty())
    with writing(store.folder):
        if path.exists() and not overwrite:
            raise UserError(
                f"{store.folder} has a set {name!r} already. Replace it (--overwrite), or give "
                "another name."
            )
        with disk_errors(path):
            make_folder(path.parent)
            replace(features, name=name).write(path)
    return path


def load_set(store: Store, name: str) -> FeatureSet:
    """A set of the store.

    Raises:
        UserError: there is none of that name, or it is of another adapter than the store.
    """
    path = _path(store, name)
    if not has_file(path):
        there = ", ".join(names_of_sets(store)) or "none yet"
        raise UserError(f"{store.folder}: no set {name!r}; there are: {there}")
    features = read_set(path)
    _check_of(store, features)
    return features


def find_set(source: str | os.PathLike[str], name: str) -> FeatureSet:
    """A set as it is typed: ``name`` in the store of ``source`` (or of that run), or a JSON file.

    Raises:
        UserError: as of :func:`read_set` and :func:`load_set`; or there is no store.
    """
    if name.endswith(".json"):
        return read_set(typed_path(name, "set"))
    return load_set(Store.open(source), name)


def names_of_sets(store: Store) -> list[str]:
    """The store's sets, in the order of the alphabet."""
    found = (store.folder / FOLDER).glob("*.json")
    return sorted(path.stem for path in found if not path.name.startswith("."))


def list_sets(store: Store) -> list[dict[str, Any]]:
    """Of each set of the store: ``name``, ``size``, ``per_layer``, ``made``, ``stale``.

    One whose file cannot be read has ``name`` and ``broken``, the reason.

    A stale one is of another adapter than the store: it stays when features are collected anew.
    """
    listed: list[dict[str, Any]] = []
    for name in names_of_sets(store):
        try:
            s = read_set(_path(store, name))
        except UserError as error:
            listed.append({"name": name, "broken": str(error)})
            continue
        listed.append(
            {
                "name": s.name,
                "size": len(s),
                "per_layer": s.per_layer(),
                "made": s.made,
                "stale": not _is_of(store, s),
            }
        )
    return listed


def _path(store: Store, name: str) -> Path:
    if not name or name[0] == "." or not all(c.isalnum() or c in "._-+=" for c in name):
        raise UserError(f"a set's name: expected letters, digits and ._-+=, got {name!r}")
    return inside(store.folder, FOLDER, f"{name}.json", source="a set's name")


def _is_of(store: Store, features: FeatureSet) -> bool:
    ours = str(store.manifest["adapter"]), store.shape("adapter")
    return (features.adapter, features.shape) == ours


def _check_of(store: Store, features: FeatureSet) -> None:
    if not _is_of(store, features):
        raise UserError(
            f"{features.told} is of another adapter than the features in {store.folder}; select "
            "it again"
        )
