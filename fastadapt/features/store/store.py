"""Open, check, read and extend a store of features."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import NotRequired, TypedDict

from fastadapt.adapter.files import adapter_digest
from fastadapt.errors import RunError, UserError, require
from fastadapt.features.store.schema import (
    COLLECTED,
    KINDS,
    MANIFEST,
    SCHEMA_VERSION,
    SHARED,
    TABLES,
    Kind,
)
from fastadapt.features.store.values import require_valid
from fastadapt.io.atomic import (
    cannot_write,
    digest,
    digest_of_input,
    disk_errors,
    locked,
    make_folder,
    replacing,
    sweep_tree,
)
from fastadapt.io.documents import Count, Sha256, check, read_json
from fastadapt.io.names import has_file, inside, typed_path
from fastadapt.io.parquet import open_parquet, read_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from duckdb import DuckDBPyConnection

LOCK = ".lock"
_ROW_GROUP = 8192  # rows; reading one feature reads one group of each column

#: Layers of a model, and units per layer: bounds above any model, small enough to loop over.
Layers = Annotated[int, msgspec.Meta(ge=1, le=10_000)]
PerLayer = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]


class Units(TypedDict):
    """Numbers of layers, and of units per layer, of one kind (features or neurons)."""

    n_layers: Layers
    n_features: PerLayer


class Listed(TypedDict):
    """Size and SHA-256 of a file, as the manifest lists them."""

    bytes: Count
    sha256: Sha256


class _Pair(TypedDict):
    dtype: NotRequired[str | None]


class _Data(TypedDict):
    texts: Count
    tokens: Count
    read: NotRequired[Count]
    too_long: NotRequired[Count]
    bad_rows: NotRequired[Count]


class _Settings(TypedDict):
    neurons_per_token: NotRequired[Annotated[int, msgspec.Meta(ge=1)] | None]


class Manifest(TypedDict):
    """The fields of ``manifest.json`` that readers use."""

    run: str
    adapter: str
    pair: _Pair
    data: _Data
    domains: list[str]
    settings: _Settings
    units: dict[Kind, Units]
    lens: dict[str, Any]
    edges: list[float]
    collected: NotRequired[dict[str, Any]]
    files: dict[str, Listed]


#: Files whose bytes match a manifest: path, size, modification time, and SHA-256.
_checked: set[tuple[str, int, int, str]] = set()


class Store:
    """A finished store of collected features.

    Attributes:
        folder: folder of the store.
        manifest: contents of ``manifest.json``.

    ``print(store)`` shows the folder, and the layers and units per layer of each kind.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest

    def __repr__(self) -> str:
        units = "".join(f", {kind}={self.shape(kind)}" for kind in self.kinds)
        return f"Store({str(self.folder)!r}{units})"

    @classmethod
    def open(
        cls, source: str | os.PathLike[str], *, adapter: str | None = None, complete: bool = True
    ) -> Store:
        """Open the store in ``source``, or in ``source/features`` of a run.

        Args:
            source: folder of a store, or of a run.
            adapter: SHA-256 that the store's adapter must have; by default that of the run that
                the folder lies in, or any if it lies in none.
            complete: whether to require every file, and a row of each unit in ``features``.

        Raises:
            UserError: no store exists, its version or adapter is not as expected, or a file is
                missing.
        """
        folder = typed_path(source, "store")
        if not has_file(folder / MANIFEST) and has_file(folder / "features" / MANIFEST):
            folder = folder / "features"
        path = folder / MANIFEST
        if not has_file(path):
            raise UserError(
                f"{source} has no features yet: no {path.name} in this folder or its features/; "
                "run fastadapt features collect"
            )
        manifest = read_json(path)
        require_version(manifest, SCHEMA_VERSION, path)
        check(manifest, Manifest, str(path))
        adapter = adapter or _adapter_of_run(folder)
        if adapter is not None and manifest["adapter"] != adapter:
            raise UserError(
                f"{folder}: these features were collected from other adapters than the run has "
                f"now, those of {manifest['run']} at that time; collect the features again "
                "(fastadapt features collect --overwrite), or give the store of this run"
            )
        store = cls(folder, manifest)
        for name in manifest["files"]:
            listed = inside(folder, *name.split("/"), source=f"{path}: files")
            if complete and not has_file(listed):
                raise UserError(f"{folder}: {name} is missing; collect the features again")
        collected = [store.path(table) for table in SHARED]
        collected += [store.path(table, kind) for kind in store.kinds for table in COLLECTED]
        for file in collected:  # a file that is not listed has no SHA-256 to check
            if (name := file.relative_to(folder).as_posix()) not in manifest["files"]:
                raise UserError(f"{path}: files: {name} is not listed; collect the features again")
        for kind in store.kinds if complete else ():
            store._check_rows(kind)
        return store

    def _check_rows(self, kind: Kind) -> None:
        n_layers, n_features = self.shape(kind)
        path = self.path("features", kind)
        if not has_file(path):
            raise UserError(
                f"{self.folder}: {kind}/{path.name} is missing; collect the features again"
            )
        with open_parquet(path, TABLES["features"]) as file:
            rows = file.metadata.num_rows
        if rows != n_layers * n_features:
            raise UserError(
                f"{self.folder / MANIFEST}: units.{kind}: n_layers={n_layers} times "
                f"n_features={n_features} gives {n_layers * n_features} units, but {path} has "
                f"{rows} rows; collect the features again"
            )

    @property
    def kinds(self) -> list[Kind]:
        """Kinds of unit in the store: ``adapter`` (features), ``base``, ``target`` (neurons)."""
        return [kind for kind in KINDS if kind in self.manifest["units"]]

    def shape(self, kind: Kind) -> tuple[int, int]:
        """Return the numbers of layers, and of units per layer, of a kind."""
        if kind not in self.manifest["units"]:
            raise UserError(
                f"{self.folder} has no features or neurons of kind {kind}, only of "
                f"{', '.join(self.kinds) or 'none'} ({MANIFEST}: units); collect them (fastadapt "
                "features collect --kinds)"
            )
        units = self.manifest["units"][kind]
        return int(units["n_layers"]), int(units["n_features"])

    def path(self, table: str, kind: Kind = "adapter") -> Path:
        """Return the file of a table of ``TABLES`` or ``SHARED``."""
        return self.folder / (f"{table}.parquet" if table in SHARED else f"{kind}/{table}.parquet")

    def has(self, table: str, kind: Kind = "adapter") -> bool:
        """Return whether a file of the table exists; only :meth:`read` checks it."""
        return os.path.lexists(self.path(table, kind))

    def read(
        self,
        table: str,
        kind: Kind = "adapter",
        *,
        columns: Sequence[str] | None = None,
        layer: int | None = None,
        features: Iterable[int] | None = None,
    ) -> pa.Table:
        """Read a table, or the rows of one layer, or of given units.

        A whole table is checked against the SHA-256 in the manifest, once per file and process
        (:meth:`check_file`). Of part of a table only the values are checked.

        Raises:
            UserError: the table is missing, cannot be read, differs from the manifest, or has an
                impossible value, such as a layer that the store does not have.
        """
        path = self.path(table, kind)
        if not self.has(table, kind):
            if table == "scales":
                raise UserError(
                    f"{self.folder} has no scales of {kind} units: they are measured by fastadapt "
                    "features collect, with --scales true (--overwrite replaces a store), for "
                    "adapters beside the base's MLPs"
                )
            commands = {
                "descriptions": "describe",
                "scores": "describe",
                "classes": "classify",
                "overlap": "overlap",
                "effects": "effects",
            }
            raise UserError(
                f"{self.folder} has no {table} of {kind} units yet; run fastadapt features "
                f"{commands.get(table, 'collect')}"
            )
        filters = [] if layer is None else [("layer", "=", layer)]
        if features is not None:
            filters.append(("feature", "in", sorted(set(features))))  # type: ignore[arg-type]
        schema = SHARED[table] if table in SHARED else TABLES[table]
        if columns is not None:
            schema = pa.schema([schema.field(name) for name in columns])
        if not filters:
            self.check_file(path)
        rows = read_table(path, schema, columns=columns, filters=filters or None)
        require_valid(path, table, rows, **self.limits(kind))
        return rows

    def limits(self, kind: Kind) -> dict[str, Any]:
        """Return the limits that values of a kind's tables may not exceed, to check the tables."""
        return {
            "shape": self.shape(kind) if kind in self.manifest["units"] else None,
            "n_texts": self.manifest["data"]["texts"],
            "domains": self.manifest["domains"],
            "n_bins": len(self.manifest["edges"]) + 1,
        }

    def check_file(self, path: Path) -> None:
        """Check a file against its SHA-256 in the manifest.

        A file is read once per process, and again if its size or modification time changes. Tables
        that judges add are not in the manifest and are not checked.

        Raises:
            UserError: the file differs, or cannot be read.
        """
        listed = self.manifest["files"].get(path.relative_to(self.folder).as_posix())
        if listed is None:
            return
        try:
            stat = path.stat()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        real = os.path.realpath(path)
        known = real, stat.st_size, stat.st_mtime_ns, listed["sha256"]
        if known in _checked and stat.st_size == listed["bytes"]:
            return
        size, sha256 = digest_of_input(path)
        if (size, sha256) != (listed["bytes"], listed["sha256"]):
            raise UserError(
                f"{path} is not the file that was collected: {MANIFEST} says {listed['bytes']:,} "
                f"bytes and SHA-256 {listed['sha256'][:12]}..., it has {size:,} and "
                f"{sha256[:12]}...; collect the features again"
            )
        _checked.add(known)

    def check_files(self, kinds: Iterable[Kind]) -> None:
        """Call :meth:`check_file` for every collected file of the given kinds of unit."""
        for table in SHARED:
            self.check_file(self.path(table))
        for kind in kinds:
            for table in TABLES:
                self.check_file(self.path(table, kind))

    def check_unit(self, kind: Kind, layer: int, feature: int) -> None:
        """Raise ``UserError`` unless the store has this unit (kind, layer, feature)."""
        n_layers, n_features = self.shape(kind)
        require(isinstance(layer, Integral), "layer", "a whole number", layer)
        require(isinstance(feature, Integral), "feature", "a whole number", feature)
        if not 0 <= layer < n_layers:
            raise UserError(f"layer: expected 0 to {n_layers - 1}, got {layer}")
        if not 0 <= feature < n_features:
            raise UserError(f"feature: expected 0 to {n_features - 1}, got {feature}")

    def connect(self, kind: Kind = "adapter") -> DuckDBPyConnection:
        """Open a DuckDB connection with a view of every table, named as the table.

        The connection reads the store's files, no other file of the machine, and no network.

        Raises:
            UserError: DuckDB is not installed, or a table cannot be read.
        """
        try:
            import duckdb
        except ImportError:
            raise UserError(
                "SQL over features needs duckdb, which is not installed; run pip install "
                "'fastadapt[features]'"
            ) from None
        connection = duckdb.connect()
        patterns = []
        for table in (*TABLES, *SHARED):
            if self.has(table, kind):
                with open_parquet(self.path(table, kind)):
                    pass
                # DuckDB reads a path as a glob pattern, and folder names as partition columns.
                patterns.append(_quoted(glob.escape(str(self.path(table, kind).resolve()))))
                rows = f"read_parquet({patterns[-1]}, hive_partitioning = false)"
                try:
                    connection.execute(f"CREATE VIEW {table} AS SELECT * FROM {rows}")
                except (duckdb.Error, RuntimeError) as error:  # DuckDB's own Parquet reader
                    connection.close()
                    reason = next(iter(str(error).splitlines()), "")[:200]
                    path = self.path(table, kind)
                    raise UserError(
                        f"{path} cannot be read as Parquet ({reason}); collect or judge the "
                        "features again"
                    ) from error
        # DuckDB checks the pattern itself (allowed_paths) and each file that it matches.
        allowed = _quoted(f"{self.folder.resolve()}/")
        connection.execute(f"SET allowed_directories = [{allowed}]")
        connection.execute(f"SET allowed_paths = [{', '.join(patterns)}]")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        return connection

    def add(self, table: str, rows: pa.Table, kind: Kind = "adapter") -> None:
        """Write or replace a table that is computed after collecting.

        Raises:
            RunError: the folder cannot be written.
        """
        write_table(rows, self.path(table, kind), TABLES[table])


def require_version(document: Any, expected: int, path: Path) -> None:
    """Raise ``UserError`` unless a JSON document has the ``schema_version`` that is expected."""
    version = document.get("schema_version") if isinstance(document, dict) else None
    if type(version) is not int or version != expected:
        raise UserError(
            f"{path}: schema_version is {version!r}, but this fastadapt reads version {expected}; "
            "collect or select the features again with this version"
        )


def _quoted(text: str) -> str:
    """Return a text as a string literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


def _adapter_of_run(folder: Path) -> str | None:
    """Return the digest of the adapters of the run that a store lies in; None outside a run."""
    adapters = folder.resolve().parent / "adapter"
    return adapter_digest(adapters) if has_file(adapters / "fastadapt.json") else None


def write_table(rows: pa.Table, path: Path, schema: pa.Schema) -> None:
    """Write a table with the columns of ``schema``, sorted by its unit and rank if it has them.

    Raises:
        RunError: the folder cannot be written.
    """
    rows = rows.select(schema.names).cast(schema)
    if "layer" in schema.names:
        keys = [name for name in ("layer", "feature", "sample", "rank") if name in schema.names]
        rows = rows.sort_by([(name, "ascending") for name in keys])
    write_pieces([rows], path, schema)


def write_pieces(pieces: Iterable[pa.Table], path: Path, schema: pa.Schema) -> None:
    """Write a table from consecutive pieces, with one piece in memory at a time.

    Raises:
        RunError: the folder cannot be written.
    """
    with disk_errors(path):
        make_folder(path.parent)
        with (
            replacing(path) as staged,
            pq.ParquetWriter(staged, schema, compression="zstd") as writer,
        ):
            for piece in pieces:
                rows = piece.select(schema.names).cast(schema)
                writer.write_table(rows, row_group_size=_ROW_GROUP)


def list_column(values: np.ndarray) -> pa.ListArray:
    """Return a column of n lists of equal length: the rows of ``values [n, m]``."""
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1)))


def write_manifest(folder: Path, facts: Mapping[str, Any], files: Sequence[Path]) -> None:
    """Write ``manifest.json`` last: the manifest makes the folder a store.

    Args:
        folder: folder of the store.
        facts: all fields but ``schema_version`` and ``files``: ``run`` (a folder), ``adapter``
            (see :func:`fastadapt.adapter.files.adapter_digest`), ``pair``, ``data`` (source,
            digest, texts, tokens; conversations read, too_long, with_markers, bad_rows),
            ``domains``, ``settings``,
            ``units`` (by kind: n_layers, n_features), ``lens`` (its settings), ``edges``,
            ``versions``.
        files: files in the folder that collecting has written.
    """
    listed = {}
    for path in sorted(files):
        size, sha256 = digest(path)
        listed[str(path.relative_to(folder))] = {"bytes": size, "sha256": sha256}
    manifest = {"schema_version": SCHEMA_VERSION, **facts, "files": listed}
    with replacing(folder / MANIFEST) as staged:
        text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
        staged.write_text(text + "\n", encoding="utf-8")


@contextmanager
def writing(store: Path) -> Iterator[None]:
    """Lock the store's folder for writing, and remove files that a killed process left in it.

    Raises:
        UserError: another process holds the lock.
        RunError: the folder cannot be written.
    """
    try:
        make_folder(store)
        with locked(store / LOCK):
            sweep_tree(store, but=["site"])  # its writer has another lock
            yield
    except BlockingIOError:
        raise UserError(
            f"{store}: another process is writing to this store; wait until it ends"
        ) from None
    except OSError as error:
        raise RunError(cannot_write(store, error, "Run the same command again.")) from error
