"""Read and write dictionaries of dictionary_learning: ``config.json`` and ``ae.safetensors``.

dictionary_learning stores the state dict of one of its classes with ``torch.save``, as ``ae.pt``.
Such a file can run code when it is read, so it is not read here: the error shows the line that
converts it. The tensors and their names are those of the class; a set has a folder per layer. By
class:

=====================  ==================================================================
AutoEncoder            SAE with ReLU that reads ``x - b_dec``; ``bias`` is ``b_dec``
AutoEncoderNew         ReLU on x itself; ``decoder.bias`` is ``b_dec``
AutoEncoderTopK        SAE with TopK that reads ``x - b_dec``; also ``k``, ``threshold``
BatchTopKSAE           SAE with BatchTopK that reads ``x - b_dec``; also ``k``, ``threshold``
JumpReluAutoEncoder    JumpReLU on x itself; ``W_enc [d, F]``
=====================  ==================================================================

``encoder.weight`` is ``[F, d]`` and ``decoder.weight`` is ``[d, F]``, the transpose of this
library's ``W_dec``. A dictionary stands in place of the activations that it reads: adapters are
refused.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from fastadapt.adapter.coder import SparseCoder
from fastadapt.adapter.coder_files import JUMPRELU, CoderSet, fill
from fastadapt.adapter.files import MAX_FEATURES, MAX_LAYERS, MAX_WIDTH
from fastadapt.adapter.hooks import MLP_HOOKS, PLACES, Hook, Hooks
from fastadapt.adapter.module import AdapterConfig
from fastadapt.adapter.sae import SAE, Transcoder
from fastadapt.errors import UserError
from fastadapt.interop.layer_folders import find_folders, one_shape
from fastadapt.io.atomic import save_tensors
from fastadapt.io.documents import Name, Positive, read_json
from fastadapt.io.names import has_file
from fastadapt.io.tensors import TensorError, check_tensor, open_tensors

__all__ = ["read", "write"]

CONFIG, WEIGHTS, PICKLE = "config.json", "ae.safetensors", "ae.pt"

_LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
_TOPK = _LINEAR | {"b_dec": "b_dec", "threshold": "threshold"}
#: Names of the tensors of each class, by this library's names; ``k`` of two classes is apart.
NAMES: Mapping[str, Mapping[str, str]] = {
    "AutoEncoder": _LINEAR | {"b_dec": "bias"},
    "AutoEncoderNew": _LINEAR | {"b_dec": "decoder.bias"},
    "AutoEncoderTopK": _TOPK,
    "BatchTopKSAE": _TOPK,
    "JumpReluAutoEncoder": {
        name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    },
}
#: Classes by the activation of an SAE that reads ``x - b_dec``, and of a coder that reads x.
_SUBTRACTING = {"relu": "AutoEncoder", "topk": "AutoEncoderTopK", "batch_topk": "BatchTopKSAE"}
_PLAIN = {"relu": "AutoEncoderNew", "jumprelu": "JumpReluAutoEncoder"}
#: Places of a dictionary that configurations name, as in ``resid_post_layer_3``.
_PLACES = ("resid_post", "mlp_out", "attn_out")
#: Vocabulary of a hook of which only the name in a configuration is known.
_VOCABULARY = "dictionary_learning"


# --- writing --------------------------------------------------------------------------------------


def write(coders: CoderSet, folder: Path) -> None:
    """Write a set into an existing folder: ``layer_{i}/config.json`` and ``ae.safetensors``.

    Raises:
        UserError: the coders are adapters, or no class computes the same.
        OSError, SafetensorError: the folder cannot be written.
    """
    name = class_of(coders)
    for layer, coder in coders.coders():
        path = folder / f"layer_{layer}"
        path.mkdir()
        save_tensors(_tensors(coder, name), path / WEIGHTS)
        config = _config(coders, name, layer)
        (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def class_of(coders: CoderSet) -> str:
    """Return the name of the class that computes the same as the coders.

    Raises:
        UserError: there is none.
    """
    coder = coders.empty
    if coders.is_additive:
        raise UserError(
            "dictionary_learning would run these adapters in place of the MLPs that they are added "
            "to. Export to the format saelens, whose files come with a function that adds them, or "
            "train with adapter.base_mlp=false"
        )
    if coder.d_in != coder.d_out or getattr(coder, "W_skip", None) is not None:
        raise UserError(
            "dictionary_learning has no skip, and equal widths of input and output; got "
            f"d_in={coder.d_in}, d_out={coder.d_out} and "
            f"{'no' if getattr(coder, 'W_skip', None) is None else 'a'} skip; export to the "
            "format saelens"
        )
    _check_place(coders)
    subtracts = isinstance(coder, SAE) and coder.subtract_b_dec
    classes = _SUBTRACTING if subtracts else _PLAIN
    if coder.config.activation not in classes:
        reads = "x - b_dec" if subtracts else "x itself"
        raise UserError(
            f"dictionary_learning has {' and '.join(classes)} for what reads {reads}, got "
            f"{coder.config.activation}; export to the format saelens"
        )
    return classes[coder.config.activation]


def _check_place(coders: CoderSet) -> None:
    """Raise ``UserError`` unless a configuration can name where the coders read and write."""
    expected = None
    if not isinstance(coders.empty, SAE):
        if coders.hooks != MLP_HOOKS:
            expected = "transcoders from the input to the output of the MLP"
    elif coders.hooks.input != coders.hooks.output or _submodule(coders.hooks, 0) is None:
        expected = f"SAEs of {', '.join(_PLACES)}, or of a place that it has named"
    if expected is not None:
        raise UserError(
            f"dictionary_learning needs {expected}, got the hooks {dict(coders.hooks.input)!r:.80} "
            f"and {dict(coders.hooks.output)!r:.80}; export to the format saelens"
        )


def _submodule(hooks: Hooks, layer: int) -> str | None:
    """Return the name of an SAE's place in a configuration; None if there is no name."""
    for place in _PLACES:
        if hooks.output == PLACES[place]:
            return f"{place}_layer_{layer}"
    name = hooks.output.get(_VOCABULARY)
    return None if name is None else name.replace("{layer}", str(layer))


def _tensors(coder: SparseCoder, name: str) -> dict[str, Tensor]:
    weights = {
        "W_enc": coder.W_enc.detach(),
        "b_enc": coder.b_enc.detach(),
        "W_dec": coder.W_dec.detach(),
        "b_dec": coder.decoder_bias().detach(),
    }
    if coder.threshold is not None:
        weights["threshold"] = coder.threshold.detach()
    elif "threshold" in NAMES[name]:
        weights["threshold"] = torch.tensor(-1.0)  # of its class: no threshold yet
    transposed = "W_enc" if name == "JumpReluAutoEncoder" else "W_dec"
    weights[transposed] = weights[transposed].T
    tensors = {NAMES[name][ours]: tensor for ours, tensor in weights.items()}
    if coder.config.k is not None:
        tensors["k"] = torch.tensor(_whole_k(coder), dtype=torch.int32)
    return tensors


def _whole_k(coder: SparseCoder) -> int:
    k = coder.config.k or 0
    if k != int(k):
        raise UserError(
            f"dictionary_learning needs a whole k, got adapter.k={k}; export to the format saelens"
        )
    return int(k)


def _config(coders: CoderSet, name: str, layer: int) -> dict[str, Any]:
    coder, is_sae = coders.empty, isinstance(coders.empty, SAE)
    submodule = _submodule(coders.hooks, layer) if is_sae else f"mlp_out_layer_{layer}"
    trainer: dict[str, Any] = {
        "dict_class": name,
        "activation_dim": coder.d_in,
        "dict_size": coder.n_features,
        "layer": layer,
        "lm_name": coders.model,
        "submodule_name": submodule,
    }
    if coder.config.k is not None:
        trainer["k"] = _whole_k(coder)
    return {"trainer": trainer, "buffer": {"io": "out" if is_sae else "in_and_out"}}


# --- reading --------------------------------------------------------------------------------------


class _Trainer(TypedDict):
    dict_class: str
    activation_dim: Annotated[int, msgspec.Meta(ge=1, le=MAX_WIDTH)]
    dict_size: Annotated[int, msgspec.Meta(ge=1, le=MAX_FEATURES)]
    k: NotRequired[Positive | None]
    layer: NotRequired[Annotated[int, msgspec.Meta(ge=0, lt=MAX_LAYERS)] | None]
    lm_name: NotRequired[Name | None]
    submodule_name: NotRequired[Name | None]


class _Buffer(TypedDict, total=False):
    io: str | None


class ConfigFile(TypedDict):
    """Keys of ``config.json`` that are read."""

    trainer: _Trainer
    buffer: NotRequired[_Buffer]


def read(path: Path) -> CoderSet:
    """Read a folder of a dictionary, or one with a folder per layer, on the CPU.

    Raises:
        UserError: the folder is none of the format, holds ``ae.pt`` alone, or its dictionaries
            differ or are of another class.
        TensorError: a file is damaged, or its tensors have other names or shapes.
    """
    refuse_pickles(path)
    return one_shape([_read(folder) for folder in find_folders(path, CONFIG, WEIGHTS)], path)


def refuse_pickles(path: Path) -> None:
    """Raise ``UserError`` with the line that converts ``ae.pt`` if there is no safetensors file."""
    below = sorted(path.glob(f"*/{PICKLE}")) if path.is_dir() else []
    for file in (path / PICKLE, *below):
        converted = file.with_name(WEIGHTS)
        if not has_file(file) or has_file(converted):
            continue
        code = (
            "import torch, safetensors.torch as s; "
            f"t = torch.load({str(file)!r}, map_location='cpu', weights_only=True); "
            f"s.save_file({{k: v.clone().contiguous() for k, v in t.items()}}, {str(converted)!r})"
        )
        raise UserError(
            f"{file} is a pickle, which can run code when it is read, and is not read here. "
            f"Convert it with this line, then repeat the command: python -c {shlex.quote(code)}"
        )


def _read(folder: Path) -> CoderSet:
    file = folder / CONFIG
    config: ConfigFile = read_json(file, ConfigFile)
    trainer = config["trainer"]
    io = config.get("buffer", {}).get("io") or "out"
    if io not in ("out", "in_and_out"):
        raise UserError(
            f"{file}: buffer.io: expected out, a dictionary of a module's output, or in_and_out, a "
            f"transcoder, got {io!r:.80}"
        )
    is_transcoder = io == "in_and_out"
    empty = _empty(trainer, is_transcoder, file)
    hooks = MLP_HOOKS
    if not is_transcoder:
        hook = _hook(trainer.get("submodule_name"), trainer.get("layer"))
        hooks = Hooks(hook, hook)
    weights = folder / WEIGHTS
    layers = {trainer.get("layer") or 0: partial(_read_weights, weights, empty, trainer)}
    return CoderSet(empty, layers, hooks, trainer.get("lm_name"))


def _hook(name: str | None, layer: int | None) -> Hook:
    """Return the place that a configuration names."""
    if name is None:
        return {"unknown": "unknown"}
    place = name.rpartition("_layer_")[0]
    if place in _PLACES:
        return PLACES[place]
    number = f"_layer_{layer}"
    if name.endswith(number):
        name = name.removesuffix(number) + "_layer_{layer}"
    return {_VOCABULARY: name}


def _empty(trainer: _Trainer, is_transcoder: bool, file: Path) -> SparseCoder:
    """Return a module on the meta device for the dictionary that ``config.json`` describes."""
    name, k = trainer["dict_class"], trainer.get("k")
    if name not in NAMES:
        raise UserError(
            f"{file}: trainer.dict_class: expected one of {', '.join(NAMES)}, got {name!r:.80}"
        )
    if "TopK" in name and (k is None or k > trainer["dict_size"]):
        raise UserError(
            f"{file}: trainer.k: expected 1 to dict_size={trainer['dict_size']}, got {k}"
        )
    subtracts = name in _SUBTRACTING.values()
    if is_transcoder and subtracts:
        raise UserError(
            f"{file}: buffer.io: expected out for {name}, which subtracts a bias from what it "
            "reads, got in_and_out"
        )
    tables = (_SUBTRACTING, _PLAIN)
    activation = next(a for table in tables for a, cls in table.items() if cls == name)
    more: dict[str, Any] = {"k": k} if "TopK" in name else {}
    more |= JUMPRELU if activation == "jumprelu" else {}
    config = AdapterConfig(trainer["dict_size"], activation, **more)
    if is_transcoder:
        return Transcoder(trainer["activation_dim"], config, device="meta")
    return SAE(trainer["activation_dim"], config, subtract_b_dec=subtracts, device="meta")


def _read_weights(file: Path, empty: SparseCoder, trainer: _Trainer) -> SparseCoder:
    name = trainer["dict_class"]
    shapes = {ours: tuple(tensor.shape) for ours, tensor in empty.state_dict().items()}
    shapes.setdefault("threshold", ())
    transposed = "W_enc" if name == "JumpReluAutoEncoder" else "W_dec"
    shapes[transposed] = shapes[transposed][::-1]
    expected = {theirs: shapes[ours] for ours, theirs in NAMES[name].items()}
    weights, k = _open(file, expected, has_k="TopK" in name)
    if k is not None and k != trainer.get("k"):
        raise TensorError(f"{file}: tensor k: expected trainer.k={trainer.get('k')}, got {k}")
    read = {ours: weights[theirs] for ours, theirs in NAMES[name].items()}
    read[transposed] = read[transposed].T.contiguous()
    if "threshold" not in empty.state_dict():
        read.pop("threshold", None)
    elif name == "BatchTopKSAE":
        read["threshold"] = read["threshold"].float().clamp(min=0)  # -1: none yet
    return fill(empty, read)


def _open(
    file: Path, shapes: Mapping[str, tuple[int, ...]], *, has_k: bool
) -> tuple[dict[str, Tensor], int | None]:
    """Return the weights of a file, and the integer ``k`` that two classes store as a tensor."""
    with open_tensors(file) as tensors:
        names = set(tensors.keys())
        if odd := sorted(names ^ (shapes.keys() | ({"k"} if has_k else set()))):
            state = "unexpected" if odd[0] in names else "missing"
            raise TensorError(f"{file}: tensor {odd[0]} is {state}")
        weights = {}
        for name, shape in shapes.items():
            weights[name] = tensors.get_tensor(name)
            check_tensor(weights[name], str(file), name, shape=shape, finite=True)
        if not has_k:
            return weights, None
        k = tensors.get_tensor("k")
        if k.shape != () or k.dtype not in (torch.int32, torch.int64):
            raise TensorError(
                f"{file}: tensor k: expected an integer (), got {k.dtype} {tuple(k.shape)}"
            )
        return weights, int(k)
