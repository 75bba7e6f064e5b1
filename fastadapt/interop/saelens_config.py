"""Schema of SAELens' ``cfg.json``, and what of it this library computes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from typing_extensions import NotRequired, TypedDict

from fastadapt.adapter.coder import SparseCoder
from fastadapt.adapter.coder_files import JUMPRELU, HooksSection
from fastadapt.adapter.files import MAX_FEATURES, MAX_WIDTH, Change, Revisions
from fastadapt.adapter.hooks import MLP_HOOKS, PLACES, Hooks
from fastadapt.adapter.module import AdapterConfig, TranscoderAdapter
from fastadapt.adapter.sae import SAE, Transcoder
from fastadapt.errors import UserError
from fastadapt.io.documents import Finite, Name, Positive

CONFIG = "cfg.json"
Version = Annotated[str, msgspec.Meta(pattern=r"^\d+(\.|$)")]
#: The activation of each architecture that is read.
_ACTIVATIONS = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}


class _Facts(TypedDict):
    additive: bool
    hooks: HooksSection
    bandwidth: NotRequired[Finite | None]
    initial_threshold: NotRequired[Finite | None]
    base: NotRequired[Name | None]
    revisions: NotRequired[Revisions | None]
    interventions: NotRequired[list[Change] | None]


class _Loading(TypedDict, total=False):
    fold_ln: bool | None


class _Metadata(TypedDict, total=False):
    sae_lens_version: Version | None
    model_name: Name | None
    hook_name: Name | None
    hook_name_out: Name | None
    hook_head_index: int | None
    hook_head_index_out: int | None
    model_from_pretrained_kwargs: _Loading | None
    fastadapt: _Facts | None


class _Arguments(TypedDict, total=False):
    k: Positive


class ConfigFile(TypedDict):
    """Keys of ``cfg.json`` that are read; those of older versions are below ``metadata``."""

    d_in: Annotated[int, msgspec.Meta(ge=1, le=MAX_WIDTH)]
    d_sae: Annotated[int, msgspec.Meta(ge=1, le=MAX_FEATURES)]
    d_out: NotRequired[Annotated[int, msgspec.Meta(ge=1, le=MAX_WIDTH)]]
    architecture: NotRequired[Name]
    k: NotRequired[Positive]
    apply_b_dec_to_input: NotRequired[bool]
    normalize_activations: NotRequired[str | bool | None]
    reshape_activations: NotRequired[str | None]
    rescale_acts_by_decoder_norm: NotRequired[bool]
    finetuning_scaling_factor: NotRequired[bool | None]
    metadata: NotRequired[_Metadata]
    sae_lens_version: NotRequired[Version | None]
    activation_fn: NotRequired[str | None]
    activation_fn_str: NotRequired[str | None]
    activation_fn_kwargs: NotRequired[_Arguments | None]
    model_name: NotRequired[Name | None]
    hook_name: NotRequired[Name | None]
    hook_point: NotRequired[Name | None]
    hook_head_index: NotRequired[int | None]
    hook_point_head_index: NotRequired[int | None]
    model_from_pretrained_kwargs: NotRequired[_Loading | None]


def check_place(metadata: Mapping[str, Any], hooks: Hooks, file: Path) -> None:
    """Raise ``UserError`` if the coder reads another tensor than the hook of this library is."""
    for key in ("hook_head_index", "hook_head_index_out"):
        if (head := metadata.get(key)) is not None:
            raise UserError(
                f"{file}: {key}: expected null, a whole hook, got head {head}; this "
                "library has no SAEs of single heads"
            )
    folded = (metadata.get("model_from_pretrained_kwargs") or {}).get("fold_ln")
    if folded and hooks.input == PLACES["mlp_in"]:
        raise UserError(
            f"{file}: model_from_pretrained_kwargs.fold_ln: expected false for "
            "mlp.hook_in, got true: it reads the norm's output without the norm's weight. Divide "
            "each row of W_enc by its weight, and set fold_ln to false"
        )
    is_adapter = (metadata.get("fastadapt") or {}).get("additive", False)
    if is_adapter and hooks != MLP_HOOKS:
        raise UserError(
            f"{file}: metadata.fastadapt.hooks: expected those of the MLP for an adapter (additive "
            f"true), got {dict(hooks.input)!r:.80} and {dict(hooks.output)!r:.80}"
        )


def empty_coder(config: ConfigFile, facts: Any, file: Path) -> SparseCoder:
    """Return a module on the meta device for the coder that ``cfg.json`` describes."""
    architecture, k = config.get("architecture", "standard"), config.get("k")
    function = config.get("activation_fn") or config.get("activation_fn_str") or "relu"
    if function == "topk":  # of versions before 6
        architecture = "topk"
        k = (config.get("activation_fn_kwargs") or {}).get("k", k)
    elif function != "relu":
        raise UserError(f"{file}: activation_fn: expected relu or topk, got {function!r:.80}")
    if architecture not in _ACTIVATIONS:
        raise UserError(
            f"{file}: architecture: expected one of {', '.join(_ACTIVATIONS)}, got "
            f"{architecture!r:.80}"
        )
    for key, plain in (
        ("normalize_activations", ("none", False, None)),
        ("reshape_activations", ("none", None)),
        ("rescale_acts_by_decoder_norm", (False,)),
        ("finetuning_scaling_factor", (False, None)),
    ):
        if (value := config.get(key, plain[0])) not in plain:
            advice = "; fold the scaling into the weights in SAELens, and save it again"
            if key == "reshape_activations":
                advice = "; this library has no SAEs of reshaped heads"
            raise UserError(f"{file}: {key}: expected {plain[0]}, got {value!r:.80}{advice}")
    activation = _ACTIVATIONS[architecture]
    settings: dict[str, Any] = {"n_features": config["d_sae"], "activation": activation}
    if activation == "topk":
        if k is None or k > config["d_sae"]:
            raise UserError(f"{file}: k: expected 1 to d_sae={config['d_sae']}, got {k}")
        settings["k"] = k
    if activation == "jumprelu":
        known = {key: (facts or {}).get(key) for key in JUMPRELU}
        settings |= {**JUMPRELU, **{k: v for k, v in known.items() if v is not None}}
    try:
        return _module(config, architecture, AdapterConfig(**settings), facts, file)
    except UserError as error:
        if str(error).startswith(str(file)):
            raise
        raise UserError(f"{file}: {error}") from None


def _module(
    config: ConfigFile, architecture: str, settings: AdapterConfig, facts: Any, file: Path
) -> SparseCoder:
    d_in, subtract = config["d_in"], config.get("apply_b_dec_to_input", True)
    if "transcoder" not in architecture:
        if facts is not None and facts["additive"]:
            raise UserError(f"{file}: metadata.fastadapt.additive: expected false for an SAE")
        return SAE(d_in, settings, subtract_b_dec=subtract, device="meta")
    if subtract:
        raise UserError(
            f"{file}: apply_b_dec_to_input: expected false for a transcoder, got {subtract}"
        )
    d_out = config.get("d_out")
    if d_out is None:
        raise UserError(f"{file}: d_out is missing, the width of a transcoder's output")
    if facts is not None and facts["additive"]:
        if "skip" in architecture:
            raise UserError(f"{file}: architecture: an adapter has no skip, got {architecture}")
        return TranscoderAdapter(d_in, settings, d_out=d_out, device="meta")
    return Transcoder(d_in, settings, d_out, skip="skip" in architecture, device="meta")
