"""Sets of SAEs, transcoders or adapters of one model, and the folder format of the first two.

A set holds coders of one shape, of some or all layers of a model, and says where they read and
write. Formats of other projects (:mod:`fastadapt.interop`) are read as a set and written from one.
The weights are read one layer at a time.

The folder is that of :mod:`fastadapt.adapter.files`: ``fastadapt.json`` and, of every layer in its
list ``layers``, ``layer_{i}.safetensors``. The kind is ``transcoder`` or ``sae``, and ``hooks``
names the places, see :mod:`fastadapt.adapter.hooks`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from fastadapt.adapter.coder import SparseCoder
from fastadapt.adapter.files import (
    CARD,
    MAX_LAYERS,
    PATTERNS,
    TRANSCODER,
    AdapterSection,
    Card,
    layer_readers,
    read_card,
    read_settings,
    transcoder_readers,
    write_adapters,
)
from fastadapt.adapter.hooks import MLP_HOOKS, Hooks
from fastadapt.adapter.module import TranscoderAdapter
from fastadapt.adapter.sae import SAE, Transcoder
from fastadapt.errors import UserError
from fastadapt.io.atomic import writing_folder
from fastadapt.io.documents import Name, check
from fastadapt.io.tensors import read_tensors

__all__ = ["CoderSet", "read_coders", "save_coders"]

#: Kinds of ``fastadapt.json`` of plain coders.
CODERS = ("transcoder", "sae")
#: Settings of JumpReLU that other projects' formats do not have; only further training reads them.
JUMPRELU: Mapping[str, Any] = {"bandwidth": 0.05, "initial_threshold": 0.01}


@dataclass(frozen=True)
class CoderSet:
    """Coders of one shape, of layers of one model.

    Attributes:
        empty: a module of their class, settings and shapes on the meta device.
        layers: functions that read a layer's coder, by the number of the layer, in order.
        hooks: places in the model that they read and write.
        model: name of the model: a folder, a hub id, or another tool's name for it; None if not
            known. For adapters, the target.
        metadata: further entries of ``metadata`` in ``fastadapt.json``.

    Example:
        >>> import torch
        >>> from fastadapt import SAE, AdapterConfig
        >>> from fastadapt.adapter.hooks import PLACES, Hooks
        >>> hooks = Hooks(PLACES["resid_post"], PLACES["resid_post"])
        >>> saes = CoderSet.from_modules({7: SAE(8, AdapterConfig(32))}, hooks, model="org/model")
        >>> saes.layers[7]().W_enc.shape, saes.empty.W_enc.device
        (torch.Size([32, 8]), device(type='meta'))
        >>> print(saes)  # doctest: +ELLIPSIS
        CoderSet(layers=[7], empty=SAE(d_in=8, n_features=32, ...), model='org/model')
    """

    empty: SparseCoder
    layers: Mapping[int, Callable[[], SparseCoder]]
    hooks: Hooks = MLP_HOOKS
    model: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"CoderSet(layers={list(self.layers)}, empty={self.empty}, model={self.model!r})"

    @classmethod
    def from_modules(
        cls,
        coders: Mapping[int, SparseCoder],
        hooks: Hooks = MLP_HOOKS,
        *,
        model: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> CoderSet:
        """Return the set of coders that are in memory, by the number of the layer.

        Raises:
            UserError: no coder, or coders that differ in class, settings or widths.
        """
        if not coders:
            raise UserError("expected SAEs or transcoders by layer, got none")
        first, *others = sorted(coders)
        for layer in others:
            if describe_coder(coders[layer]) != describe_coder(coders[first]):
                raise UserError(
                    f"layer {layer} differs from layer {first} in class, configuration or width; "
                    "give modules of one configuration"
                )
        layers = {i: partial(_same, coders[i]) for i in sorted(coders)}
        return cls(empty_like(coders[first]), layers, hooks, model, metadata or {})

    @property
    def is_additive(self) -> bool:
        """Whether the output is added to that of the base's MLP, as that of adapters is."""
        return isinstance(self.empty, TranscoderAdapter) and self.empty.config.base_mlp

    def coders(self) -> Iterator[tuple[int, SparseCoder]]:
        """Yield the layers with their coders, of which one is in memory at a time."""
        for layer, read in self.layers.items():
            yield layer, read()


def _same(coder: SparseCoder) -> SparseCoder:
    return coder


def empty_like(coder: SparseCoder) -> SparseCoder:
    """Return a module of a coder's class, settings and shapes on the meta device."""
    if isinstance(coder, TranscoderAdapter):
        return TranscoderAdapter(coder.d_in, coder.config, d_out=coder.d_out, device="meta")
    if isinstance(coder, SAE):
        subtract = coder.subtract_b_dec
        return SAE(coder.d_in, coder.config, subtract_b_dec=subtract, device="meta")
    assert isinstance(coder, Transcoder)
    skip = coder.W_skip is not None
    return Transcoder(coder.d_in, coder.config, coder.d_out, skip=skip, device="meta")


def fill(empty: SparseCoder, weights: Mapping[str, Tensor]) -> SparseCoder:
    """Return a copy of a module on the meta device whose parameters are the given tensors."""
    coder = copy.deepcopy(empty)
    coder.load_state_dict(weights, assign=True)
    return coder


def thresholds_of(coder: SparseCoder) -> Tensor:
    """Return the thresholds ``[F]`` of JumpReLU, or of BatchTopK in ``eval()``.

    They have the weights' dtype, and the same features fire: see :func:`round_down`.
    """
    assert coder.threshold is not None
    thresholds = round_down(coder.threshold.detach(), coder.W_enc.dtype)
    return thresholds.expand(coder.n_features).contiguous()


def round_down(thresholds: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the largest values of a dtype that are not above the thresholds.

    A pre-activation of the dtype is above a threshold exactly if it is above the rounded one.

    Example:
        >>> float(round_down(torch.tensor(0.3019), torch.bfloat16))
        0.30078125
    """
    rounded = thresholds.to(dtype)
    below = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
    return torch.where(rounded.double() > thresholds.double(), below, rounded)


def describe_coder(coder: SparseCoder) -> dict[str, Any]:
    """Return the entries of ``fastadapt.json`` that describe a coder, its hooks excepted."""
    if isinstance(coder, TranscoderAdapter):
        return coder.card()
    card: dict[str, Any] = {
        "kind": "sae" if isinstance(coder, SAE) else "transcoder",
        "additive": False,
        "orientation": {"W_enc": "[n_features, d_in]", "W_dec": "[n_features, d_out]"},
        "d_in": coder.d_in,
        "d_out": coder.d_out,
        "adapter": asdict(coder.config) | {"n_features": coder.n_features},
    }
    if isinstance(coder, SAE):
        return card | {"subtract_b_dec": coder.subtract_b_dec}
    assert isinstance(coder, Transcoder)
    card["orientation"]["W_skip"] = "[d_out, d_in]"
    return card | {"skip": coder.W_skip is not None}


def save_coders(coders: CoderSet, folder: str | os.PathLike[str]) -> None:
    """Write a set of SAEs or transcoders as ``fastadapt.json`` and ``layer_{i}.safetensors``.

    Adapters, and transcoders of the MLPs of layers 0, 1, ... that have no skip, are written as
    adapters are (:func:`fastadapt.save_adapters`), which all commands read. Such transcoders have
    ``base_mlp`` false, and the one model whose MLPs they replace is both target and base. The base
    of adapters is not known to other formats.

    Files of coders in the folder are replaced after all new ones are on the disk.

    Raises:
        RunError: the folder cannot be written. Its contents are unchanged.

    Example:
        >>> from tempfile import mkdtemp
        >>> from fastadapt import AdapterConfig, Transcoder, load_adapters
        >>> folder, transcoder = mkdtemp(), Transcoder(8, AdapterConfig(32), skip=True)
        >>> save_coders(CoderSet.from_modules({4: transcoder}), folder)
        >>> load_adapters(folder)[0][0]
        Transcoder(d_in=8, n_features=32, d_out=8, activation=relu, skip=True)
    """
    metadata = dict(coders.metadata)
    every = list(coders.layers) == list(range(len(coders.layers)))
    is_plain = isinstance(coders.empty, Transcoder) and not isinstance(coders.empty, SAE)
    as_adapters = isinstance(coders.empty, TranscoderAdapter) or (
        is_plain
        and every
        and coders.hooks == MLP_HOOKS
        and getattr(coders.empty, "W_skip", None) is None
        and coders.empty.d_in == coders.empty.d_out
    )
    with writing_folder(Path(folder), last=CARD, ours=PATTERNS) as staged:
        if as_adapters:
            if coders.model is not None:
                pair = {"target": coders.model}
                pair |= {} if coders.is_additive else {"base": coders.model}
                metadata = {**pair, **metadata}
            write_adapters(map(_as_adapter, (c for _, c in coders.coders())), staged, metadata)
            return
        metadata = {"model": coders.model, **metadata}
        hooks = {name: dict(hook) for name, hook in coders.hooks._asdict().items()}
        write_adapters(
            (coder for _, coder in coders.coders()),
            staged,
            metadata,
            describe=lambda coder: {**describe_coder(coder), "hooks": hooks},
            numbers=list(coders.layers),
        )


def _as_adapter(coder: SparseCoder) -> TranscoderAdapter:
    if isinstance(coder, TranscoderAdapter):
        return coder
    config = replace(coder.config, base_mlp=False)
    adapter = TranscoderAdapter(coder.d_in, config, d_out=coder.d_out, device="meta")
    adapter.load_state_dict(coder.state_dict(), assign=True)
    return adapter


# --- reading --------------------------------------------------------------------------------------

_Names = Annotated[dict[str, Name], msgspec.Meta(min_length=1)]


class HooksSection(TypedDict):
    """Names of the places that coders read and write, by vocabulary."""

    input: _Names
    output: _Names


class CoderCard(Card):
    """Keys that the ``fastadapt.json`` of SAEs and transcoders has."""

    adapter: AdapterSection
    hooks: HooksSection
    layers: Annotated[
        list[Annotated[int, msgspec.Meta(ge=0, lt=MAX_LAYERS)]],
        msgspec.Meta(min_length=1, max_length=MAX_LAYERS),
    ]
    skip: NotRequired[bool]
    subtract_b_dec: NotRequired[bool]


def read_coders(folder: str | os.PathLike[str]) -> CoderSet:
    """Read a folder of SAEs, transcoders or adapters, one layer at a time.

    Args:
        folder: as :func:`save_coders` or :func:`fastadapt.save_adapters` writes it.

    Raises:
        UserError: the folder holds other weights, or its ``fastadapt.json`` is damaged.
    """
    path = Path(folder)
    card = read_card(path)
    metadata = card["metadata"]
    if card["kind"] in CODERS:
        empty, readers = coder_readers(path, card)
        hooks = Hooks(**{name: card["hooks"][name] for name in Hooks._fields})
        layers = dict(zip(card["layers"], readers, strict=True))
        return CoderSet(empty, layers, hooks, metadata.get("model"), metadata)
    if card["kind"] != TRANSCODER:
        raise UserError(
            f"{folder}: expected adapters, transcoders or SAEs, got weights of kind "
            f"{card['kind']!r:.80}"
        )
    adapters = transcoder_readers(path, card)
    adapter = TranscoderAdapter(card["d_in"], card["adapter"], d_out=card["d_out"], device="meta")
    layers = dict(enumerate(adapters))
    return CoderSet(adapter, layers, MLP_HOOKS, metadata.get("target"), metadata)


def coder_readers(
    path: Path, card: dict[str, Any]
) -> tuple[SparseCoder, list[Callable[[], SparseCoder]]]:
    """Return an empty module of the coders' shape, and a function that reads each layer.

    ``card["adapter"]`` becomes an :class:`~fastadapt.AdapterConfig`.

    Raises:
        UserError: ``card`` does not describe SAEs or transcoders, or does not match the files.
    """
    card_file = str(path / CARD)
    check(card, CoderCard, card_file)
    card["adapter"] = read_settings(card["adapter"], card_file)
    if card["additive"] is not False:
        raise UserError(f"{card_file}: 'additive' must be false for {card['kind']}")
    layers = card["layers"]
    if len(layers) != card["n_layers"] or layers != sorted(set(layers)):
        raise UserError(
            f"{card_file}: layers: expected n_layers={card['n_layers']} different numbers in "
            f"order, got {layers!r:.80}"
        )
    empty = _empty(card, card_file)
    read = partial(_read_coder, empty=empty)
    return empty, layer_readers(path, card, read, layers)


def _empty(card: Mapping[str, Any], card_file: str) -> SparseCoder:
    d_in, d_out, config = card["d_in"], card["d_out"], card["adapter"]
    if card["kind"] == "transcoder":
        skip = card.get("skip", False)
        return Transcoder(d_in, config, d_out, skip=skip, device="meta")
    if d_in != d_out:
        raise UserError(f"{card_file}: d_out: an SAE has d_in={d_in}, got d_out={d_out}")
    try:
        return SAE(d_in, config, subtract_b_dec=card.get("subtract_b_dec", False), device="meta")
    except UserError as error:
        raise UserError(f"{card_file}: {error}") from None


def _read_coder(
    file: Path, layer: int, card: Mapping[str, Any], *, empty: SparseCoder
) -> SparseCoder:
    expected = {name: tuple(t.shape) for name, t in empty.state_dict().items()}
    return fill(empty, read_tensors(file, expected, finite=True))
