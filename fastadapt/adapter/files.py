"""Read and write folders of adapters: ``fastadapt.json`` and ``layer_{i}.safetensors``.

Transcoders, of the kind ``transcoder_adapter``, are added to the base's MLPs, or replace them.
Weights of the other kinds, ``mlp``, ``norms``, ``bias`` and ``lora``, change the model itself and
are read by :mod:`fastadapt.models.trained_files`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar, runtime_checkable

import msgspec
from torch import nn
from typing_extensions import NotRequired, TypedDict

from fastadapt.adapter.module import AdapterConfig, TranscoderAdapter
from fastadapt.errors import UserError
from fastadapt.io.atomic import digest_of_input, save_tensors, writing_folder
from fastadapt.io.documents import Count, Finite, Mapped, Name, NonNegative, check, read_json
from fastadapt.io.names import has_file, typed_path
from fastadapt.io.tensors import read_tensors

T = TypeVar("T", bound=nn.Module)

SCHEMA_VERSION = 1
TRANSCODER = "transcoder_adapter"
CARD = "fastadapt.json"
#: Names of the files in a folder of adapters.
PATTERNS = (CARD, "layer_*.safetensors")
#: Larger than in any model. A file with a larger number is damaged, and is refused before
#: anything of that size is allocated.
MAX_LAYERS, MAX_WIDTH, MAX_FEATURES = 10_000, 1 << 20, 1 << 26


@runtime_checkable
class HasCard(Protocol):
    """Interface of one layer's weights that can be saved: a transcoder's or a baseline's."""

    def card(self) -> dict[str, Any]:
        """Return the entries of ``fastadapt.json`` that describe the weights."""


def describe_adapter(adapter: HasCard) -> dict[str, Any]:
    """Return the entries of ``fastadapt.json`` that describe an adapter or a baseline."""
    return adapter.card()


def save_adapters(
    adapters: Iterable[nn.Module],
    folder: str | os.PathLike[str],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write one adapter per layer as ``fastadapt.json`` and ``layer_{i}.safetensors``.

    The JSON file holds the schema version, the kind, the widths and ``metadata``. For transcoders
    it also holds the orientation of the matrices (one row per feature in both), the hook (the MLP's
    input, after the norm and its weight) and whether their output is *added*. It is
    written last: a folder with ``fastadapt.json`` is complete.

    Adapters in the folder are replaced after all new ones are on the disk. Files with other names
    stay.

    Args:
        adapters: layer 0 first, all with one configuration and one pair of widths. An iterator is
            consumed one adapter at a time.
        folder: created if it does not exist.
        metadata: JSON-serialisable, such as model ids, revisions, loss weights, measured L0.

    Raises:
        UserError: no adapter, or adapters that differ in configuration or width.
        RunError: the folder cannot be written. Its contents are unchanged.

    Example:
        >>> from tempfile import mkdtemp
        >>> from fastadapt import AdapterConfig, TranscoderAdapter, load_adapters, save_adapters
        >>> folder = mkdtemp()
        >>> save_adapters([TranscoderAdapter(8, AdapterConfig(32))], folder, {"step": 3})
        >>> adapters, metadata = load_adapters(folder)
        >>> len(adapters), metadata
        (1, {'step': 3})
    """
    with writing_folder(Path(folder), last=CARD, ours=PATTERNS) as staged:
        write_adapters(adapters, staged, metadata)


def write_adapters(
    adapters: Iterable[nn.Module],
    path: Path,
    metadata: Mapping[str, Any] | None = None,
    *,
    describe: Callable[[Any], dict[str, Any]] = describe_adapter,
    numbers: Sequence[int] | None = None,
) -> None:
    """Write the files of :func:`save_adapters` into an existing, empty folder.

    Args:
        adapters, metadata: as in :func:`save_adapters`.
        path: the folder.
        describe: returns the entries of ``fastadapt.json`` that describe an adapter.
        numbers: number of the layer of each adapter; 0, 1, ... if not given.

    Raises:
        UserError: no adapter, or adapters that differ in configuration or width.
        OSError, SafetensorError: the folder cannot be written.
    """
    first: dict[str, Any] | None = None
    shapes: list[dict[str, list[int]]] = []
    for adapter, layer in zip(adapters, count() if numbers is None else numbers, strict=False):
        card = describe(adapter)
        first = first or card
        if card != first:
            raise UserError(
                f"layer {layer} differs from layer {numbers[0] if numbers else 0} in configuration "
                "or width; save adapters of one configuration"
            )
        tensors = adapter.state_dict()
        save_tensors(tensors, path / f"layer_{layer}.safetensors")
        shapes.append({name: list(tensor.shape) for name, tensor in tensors.items()})
    if first is None:
        raise UserError("expected one adapter per layer to save, got none")
    card = {"schema_version": SCHEMA_VERSION, **first, "n_layers": len(shapes)}
    if numbers is not None:
        card["layers"] = list(numbers)
    elif card["kind"] != TRANSCODER:
        card["tensors"] = shapes
    card["metadata"] = dict(metadata or {})
    (path / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def adapters_of(source: str | os.PathLike[str]) -> Path:
    """Return the folder of adapters: ``source`` itself, or ``adapter/`` in a finished run.

    Raises:
        UserError: ``source`` is neither, or is a run that has not finished.
    """
    folder = typed_path(source, "run")
    if has_file(folder / CARD):
        return folder
    if has_file(folder / "adapter" / CARD):
        return folder / "adapter"
    if has_file(folder / "config.yaml"):
        raise UserError(
            f"{folder}: this run is not finished: it has no adapter/ yet; resume its training "
            "(fastadapt train ... --resume)"
        )
    raise UserError(f"{source}: expected a run or a folder of adapters with fastadapt.json")


def adapter_digest(folder: Path) -> str:
    """Return the SHA-256 of a folder of adapters, over the layers' files in order."""
    sha256 = hashlib.sha256()
    for path in sorted(folder.glob("layer_*.safetensors")):
        sha256.update(f"{path.name} {digest_of_input(path)}\n".encode())
    return sha256.hexdigest()


class AdapterSection(TypedDict):
    """Types of the settings of :class:`AdapterConfig` in ``fastadapt.json`` and ``config.json``.

    :class:`AdapterConfig` itself checks the values.
    """

    n_features: Annotated[int, msgspec.Meta(ge=1, le=MAX_FEATURES)]
    activation: str
    k: int | float | None
    bandwidth: int | float | None
    initial_threshold: int | float | None
    bias: NotRequired[bool]
    base_mlp: NotRequired[bool]
    implementation: str


_Width = Annotated[int, msgspec.Meta(ge=1, le=MAX_WIDTH)]


class Revisions(TypedDict, total=False):
    """Commits of the models that the adapters were trained with; null for local folders."""

    target: Name | None
    base: Name | None


class Digests(TypedDict, total=False):
    """Fingerprints of the models that the adapters were trained with."""

    target: Name | None
    base: Name | None


class Weights(TypedDict, total=False):
    """Loss weights of the run, as read from ``metadata``. Other settings are not read."""

    sparsity: NonNegative | None
    nmse: NonNegative | None
    bridge: NonNegative | None


class Measured(TypedDict, total=False):
    """Measurements of the run, as read from ``metadata``; null for a number that was not finite."""

    l0_mean: NonNegative | None
    sparsity_weight: NonNegative | None
    tokens: Count | None


class ChangedSet(TypedDict):
    """The set of features that an intervention changes."""

    name: Name | None
    size: Count


class Change(TypedDict):
    """Intervention recorded in ``fastadapt.json`` of changed adapters."""

    kind: Name
    set: ChangedSet
    adapter: Name
    scale: NotRequired[Finite | None]


class Origin(TypedDict):
    """The run that the adapters of a run began as, and the digest of its adapters, if known."""

    run: Name
    adapter: NotRequired[Name]


class Metadata(TypedDict, total=False):
    """Optional keys of ``metadata`` in ``fastadapt.json`` that are read. Other keys are allowed."""

    target: Name | None
    base: Name | None
    model: Name | None
    revisions: Revisions | None
    weights: Digests | None
    configs: Digests | None
    versions: dict[str, str] | None
    # msgspec 0.22 corrupts memory for a string of two constraints, such as Name, beside a mapping.
    family: str | Mapped | None
    architecture: Name | None
    objective: Weights | None
    measured: Measured | None
    interventions: list[Change] | None
    init_from: Origin | None


class Card(TypedDict):
    """Keys that every ``fastadapt.json`` has, whether of transcoders or of a baseline."""

    schema_version: int
    kind: str
    additive: bool
    n_layers: Annotated[int, msgspec.Meta(ge=1, le=MAX_LAYERS)]
    d_in: _Width
    d_out: _Width
    metadata: Metadata


class TranscoderCard(Card):
    """Keys that the ``fastadapt.json`` of transcoders has."""

    adapter: AdapterSection


def read_card(path: Path) -> dict[str, Any]:
    """Read ``fastadapt.json`` of a folder and check the keys that every such file has.

    Raises:
        UserError: no such file, an unknown schema version, or a value of the wrong type.
    """
    card_file = path / CARD
    if not has_file(card_file):
        raise UserError(
            f"{path} holds no adapters: fastadapt.json is missing; give a folder that holds it"
        )
    card: dict[str, Any] = read_json(card_file, dict[str, Any], constants=True)
    version = card.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise UserError(
            f"{card_file}: schema_version is {version!r:.80}; this fastadapt reads "
            f"{SCHEMA_VERSION}. Use the version of fastadapt that wrote the file"
        )
    check(card, Card, str(card_file))
    return card


def read_settings(settings: Any, source: str) -> AdapterConfig:
    """Build an :class:`AdapterConfig` from a file's settings, none of which may be missing.

    Args:
        settings: the value of ``adapter`` in ``fastadapt.json`` or ``config.json``.
        source: the file, for error messages.

    Raises:
        UserError: a setting is missing, unknown or impossible.
    """
    check(settings, AdapterSection, source)
    if unknown := sorted(settings.keys() - AdapterSection.__annotations__.keys()):
        raise UserError(f"{source}: 'adapter' has unknown settings {unknown}")
    try:
        return AdapterConfig(**settings)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def layer_readers(
    path: Path,
    card: Mapping[str, Any],
    read_layer: Callable[[Path, int, Mapping[str, Any]], T],
    numbers: Sequence[int] | None = None,
) -> list[Callable[[], T]]:
    """Return one function per layer, the first layer first, that reads the layer's file.

    Args:
        path: the folder.
        card: contents of its ``fastadapt.json``.
        read_layer: reads one file; called with its path, the number of the layer, and ``card``.
        numbers: numbers of the layers; 0, 1, ... if not given.

    Raises:
        UserError: the layers that ``card`` declares and the files ``layer_*`` do not match.
    """
    numbers = range(card["n_layers"]) if numbers is None else numbers
    expected = {f"layer_{i}.safetensors" for i in numbers}
    present = {p.name for p in path.glob("layer_*.safetensors")}
    if expected != present:
        raise UserError(
            f"{path}: layers of the adapters do not match fastadapt.json: "
            f"missing {sorted(expected - present)}, unexpected {sorted(present - expected)}. "
            "Copy the folder again"
        )
    return [partial(read_layer, path / f"layer_{i}.safetensors", i, card) for i in numbers]


def transcoder_readers(path: Path, card: dict[str, Any]) -> list[Callable[[], TranscoderAdapter]]:
    """Return the :func:`layer_readers` of transcoders.

    ``card["adapter"]`` becomes an :class:`AdapterConfig`.

    Raises:
        UserError: ``card`` does not describe transcoders, or does not match the files.
    """
    card_file = str(path / CARD)
    check(card, TranscoderCard, card_file)
    card["adapter"] = read_settings(card["adapter"], card_file)
    if card["additive"] is not card["adapter"].base_mlp:
        beside = "beside the base's MLPs" if card["adapter"].base_mlp else "in place of them"
        raise UserError(
            f"{card_file}: 'additive' must be {str(card['adapter'].base_mlp).lower()} for "
            f"transcoders {beside}"
        )
    return layer_readers(path, card, _read_transcoder)


def read_transcoders(
    folder: str | os.PathLike[str], purpose: str
) -> tuple[list[Callable[[], TranscoderAdapter]], dict[str, Any]]:
    """Read a folder of transcoders, one layer at a time.

    Args:
        folder: as :func:`save_adapters` writes it.
        purpose: what needs transcoders, as subject of the error message: ``this export``.

    Returns:
        A function for every layer that reads its adapter, layer 0 first; and the contents of
        ``fastadapt.json``, of which ``adapter`` is an :class:`AdapterConfig`.

    Raises:
        UserError: the weights are not transcoders, or the folder is damaged.
    """
    path = Path(folder)
    card = read_card(path)
    if card["kind"] != TRANSCODER:
        raise UserError(
            f"{folder}: {purpose} needs transcoder adapters; the folder holds weights of kind "
            f"{card['kind']!r:.80}"
        )
    return transcoder_readers(path, card), card


def _read_transcoder(file: Path, layer: int, card: Mapping[str, Any]) -> TranscoderAdapter:
    adapter = TranscoderAdapter(card["d_in"], card["adapter"], d_out=card["d_out"], device="meta")
    expected = {name: tuple(t.shape) for name, t in adapter.state_dict().items()}
    adapter.load_state_dict(read_tensors(file, expected, finite=True), assign=True)
    return adapter
