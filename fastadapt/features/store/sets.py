"""Named sets of an adapter's features: selected, combined, and saved in the store.

A set is one JSON file, ``sets/NAME.json`` in the store: the SHA-256 of the adapter (see
:func:`fastadapt.adapter.files.adapter_digest`), its shape, the expression that gives the
set, and the sorted pairs (layer, feature), both counted from 0.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from typing_extensions import NotRequired, TypedDict

from fastadapt.errors import UserError
from fastadapt.features.store.store import Layers, PerLayer, Store, require_version, writing
from fastadapt.io.atomic import disk_errors, make_folder, replacing
from fastadapt.io.documents import Count, check, read_json
from fastadapt.io.names import has_file, inside, typed_path

FOLDER = "sets"
SCHEMA_VERSION = 1
Pair = tuple[int, int]
_PAIR = re.compile(r"(\d{1,9})/(\d{1,9})", re.ASCII)


def pair_of(text: str) -> Pair:
    """Return layer and feature of a name like ``2/17``.

    Raises:
        UserError: the text is no such name.

    Example:
        >>> pair_of("2/17")
        (2, 17)
    """
    if (match := _PAIR.fullmatch(text.strip())) is None:
        raise UserError(f"expected a feature as LAYER/NUMBER, such as 2/17, got {text!r}")
    return int(match[1]), int(match[2])


@dataclass(frozen=True)
class FeatureSet:
    """A set of features of one adapter.

    ``a | b``, ``a & b``, ``a - b`` and ``~a`` are sets of the same adapter.

    Attributes:
        adapter: SHA-256 of the adapter.
        shape: layers of the adapter, and features per layer.
        features: distinct pairs (layer, feature), sorted; :meth:`from_pairs` sorts.
        expression: the selection that gives the set, in words.
        name: name in the store; empty if the set is not saved.

    Example:
        >>> a = FeatureSet.from_pairs([(1, 5), (0, 2)], adapter="", shape=(2, 6), expression="a")
        >>> b = FeatureSet.from_pairs([(1, 5)], adapter="", shape=(2, 6), expression="b")
        >>> (a - b).features, (a - b).expression
        (((0, 2),), '(a) - (b)')
    """

    adapter: str
    shape: tuple[int, int]
    features: tuple[Pair, ...]
    expression: str
    name: str = ""

    def __post_init__(self) -> None:
        n_layers, n_features = self.shape
        for layer, feature in self.features:
            if not (0 <= layer < n_layers and 0 <= feature < n_features):
                raise UserError(
                    f"{self.label}: expected features of layers 0 to {n_layers - 1} and numbers 0 "
                    f"to {n_features - 1}, got feature {feature} of layer {layer}"
                )
        if any(a >= b for a, b in zip(self.features, self.features[1:], strict=False)):
            raise UserError(
                f"{self.label}: expected distinct features, sorted by layer and number; build the "
                "set with FeatureSet.from_pairs"
            )

    @classmethod
    def from_pairs(
        cls, pairs: Iterable[Pair], *, adapter: str, shape: tuple[int, int], expression: str
    ) -> FeatureSet:
        """Return the set of these pairs (layer, feature), given in any order and with repeats."""
        return cls(adapter, shape, tuple(sorted(set(pairs))), expression)

    @property
    def label(self) -> str:
        """The set in words, for messages."""
        return f"set {self.name!r}" if self.name else f"the set {self.expression}"

    def __len__(self) -> int:
        return len(self.features)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.features)

    def __contains__(self, pair: object) -> bool:
        return pair in self._pairs

    def __or__(self, other: FeatureSet) -> FeatureSet:
        return self._combined(other, self._pairs | other._pairs, "|")

    def __and__(self, other: FeatureSet) -> FeatureSet:
        return self._combined(other, self._pairs & other._pairs, "&")

    def __sub__(self, other: FeatureSet) -> FeatureSet:
        return self._combined(other, self._pairs - other._pairs, "-")

    def __invert__(self) -> FeatureSet:
        n_layers, n_features = self.shape
        every = {(layer, i) for layer in range(n_layers) for i in range(n_features)}
        return replace(
            self,
            features=tuple(sorted(every - self._pairs)),
            expression=f"~({self.expression})",
            name="",
        )

    def rows(self, layer: int) -> list[int]:
        """Return the set's features in a layer."""
        return [feature for other, feature in self.features if other == layer]

    def per_layer(self) -> list[int]:
        """Return the number of features in each layer."""
        counts = [0] * self.shape[0]
        for layer, _ in self.features:
            counts[layer] += 1
        return counts

    def not_empty(self) -> FeatureSet:
        """Return the set itself; raise ``UserError`` if it is empty."""
        if not self.features:
            raise UserError(f"{self.label} is empty; choose another criterion")
        return self

    def digest(self) -> str:
        """Return the SHA-256 of the adapter and the features."""
        content = [self.adapter, list(self.shape), list(self.features)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def write(self, path: Path) -> None:
        """Write the set as JSON into an existing folder."""
        plain = {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "adapter": self.adapter,
            "n_layers": self.shape[0],
            "n_features": self.shape[1],
            "made": self.expression,
            "size": len(self),
            "features": self.features,
        }
        with replacing(path) as staged:
            staged.write_text(json.dumps(plain, ensure_ascii=False) + "\n", encoding="utf-8")

    @cached_property
    def _pairs(self) -> frozenset[Pair]:
        return frozenset(self.features)

    def _combined(self, other: FeatureSet, pairs: Iterable[Pair], sign: str) -> FeatureSet:
        if (self.adapter, self.shape) != (other.adapter, other.shape):
            raise UserError(
                f"{self.label} and {other.label} were selected from different adapters; combine "
                "sets of one run"
            )
        expression = f"({self.expression}) {sign} ({other.expression})"
        return replace(self, features=tuple(sorted(pairs)), expression=expression, name="")


class _Set(TypedDict):
    name: str
    adapter: str
    n_layers: Layers
    n_features: PerLayer
    made: str
    size: NotRequired[Count]
    features: list[tuple[Count, Count]]


def read_set(path: Path) -> FeatureSet:
    """Read a set from a JSON file.

    Raises:
        UserError: the file cannot be read, holds no set, or an empty one.
    """
    plain = read_json(path)
    require_version(plain, SCHEMA_VERSION, path)
    check(plain, _Set, str(path))
    shape = plain["n_layers"], plain["n_features"]
    pairs = tuple((layer, feature) for layer, feature in plain["features"])
    try:
        features = FeatureSet(plain["adapter"], shape, pairs, plain["made"], plain["name"])
        features.not_empty()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if (size := plain.get("size", len(features))) != len(features):
        raise UserError(
            f"{path}: size: expected {len(features):,}, the length of features; got {size:,}"
        )
    return features


def save_set(store: Store, features: FeatureSet, name: str, *, overwrite: bool = False) -> Path:
    """Save a set in the store as ``name``, and return its file.

    Raises:
        UserError: the set is empty or of other adapters than the store, the name cannot be a file
            name, a set of that name exists (without ``overwrite``), or another process writes to
            the store.
        RunError: the store cannot be written.
    """
    path = _path(store, name)
    _check_of(store, features.not_empty())
    with writing(store.folder):
        if has_file(path) and not overwrite:
            raise UserError(
                f"{store.folder} has a set {name!r} already. Replace it (--overwrite), or give "
                "another name."
            )
        with disk_errors(path):
            make_folder(path.parent)
            replace(features, name=name).write(path)
    return path


def load_set(store: Store, name: str) -> FeatureSet:
    """Load the set with this name from the store.

    Raises:
        UserError: no set has that name, or the set belongs to other adapters than the store.
    """
    path = _path(store, name)
    if not has_file(path):
        known = ", ".join(names_of_sets(store)) or "none yet"
        raise UserError(f"{store.folder}: no set {name!r}; saved sets: {known}")
    features = read_set(path)
    _check_of(store, features)
    return features


def find_set(source: str | os.PathLike[str], name: str) -> FeatureSet:
    """Load the set ``name`` of the store (or run) in ``source``.

    A name that ends with ``.json`` is a file; features like ``2/17,3/401`` are a set themselves.

    Raises:
        UserError: as :func:`read_set` and :func:`load_set`; or ``source`` has no store.
    """
    if name.endswith(".json"):
        return read_set(typed_path(name, "set"))
    store = Store.open(source)
    return named(store, name.split(",")) if "/" in name else load_set(store, name)


def named(store: Store, names: Sequence[str]) -> FeatureSet:
    """Return the set of the features with these names, such as ``2/17``.

    Raises:
        UserError: a name is none, or the adapter has no such feature.
    """
    return FeatureSet.from_pairs(
        map(pair_of, names),
        adapter=str(store.manifest["adapter"]),
        shape=store.shape("adapter"),
        expression=f"features {' '.join(names)}",
    )


def names_of_sets(store: Store) -> list[str]:
    """Return the names of the store's sets, sorted."""
    files = (store.folder / FOLDER).glob("*.json")
    return sorted(path.stem for path in files if not path.name.startswith("."))


def list_sets(store: Store) -> list[dict[str, Any]]:
    """Return ``name``, ``size``, ``per_layer``, ``made`` and ``stale`` of each set of the store.

    A set whose file cannot be read has ``name`` and ``broken``, the reason. A stale set
    belongs to other adapters than the store: sets stay when features are collected again.
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
                "made": s.expression,
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
            f"{features.label} was selected from other adapters than those of {store.folder}; "
            "select it again"
        )
