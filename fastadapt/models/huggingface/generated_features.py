"""Record which features fire on which token while ``generate`` runs.

The codes come from forward hooks, which exist during a recorded call alone: without recording, a
model runs the same code as before. A hook applies the encoder once more to the input that the MLP
got. The tokens are therefore those of an unrecorded call, bit for bit.

Shape suffixes: B sequences, T tokens of one call of the model, S tokens of a returned sequence.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.generation import GenerateDecoderOnlyOutput

from fastadapt.errors import RunError, UserError
from fastadapt.kernels.transcoder import SparseCodes
from fastadapt.models.adapted_mlp import AdaptedMLP

#: Ways to generate in which a call of the model reads the next tokens of the returned sequences.
MODES = ("greedy_search", "sample")


@dataclass
class GenerateFeaturesOutput(GenerateDecoderOnlyOutput):
    """What ``generate`` returns, with the features that fired.

    Attributes:
        features: for each sequence, the codes of each layer, layer 0 first. ``tokens`` of a code
            is an index into the sequence's row of ``sequences``. Padding has no codes, and the last
            token of a response has none: it was drawn, but the model has not read it.
    """

    features: list[list[SparseCodes]] | None = None


class Reading(NamedTuple):
    """Codes of one call of a layer's adapter, ordered by sequence, token and feature."""

    length: int  #: T.
    rows: Tensor  #: int64 [C]: sequences, 0 to B - 1.
    columns: Tensor  #: int64 [C]: tokens, 0 to T - 1.
    features: Tensor  #: int64 [C].
    values: Tensor  #: [C].


@contextmanager
def recorded(mlps: Sequence[AdaptedMLP], *, cached: bool) -> Iterator[list[list[Reading]]]:
    """Record the codes of MLPs in the calls of this thread inside the context.

    Args:
        mlps: the MLPs, layer 0 first.
        cached: whether each call reads new tokens only; otherwise each call reads the whole text,
            and the last call alone is held.

    Yields:
        For each layer its readings, in the order of the calls.
    """
    layers: list[list[Reading]] = [[] for _ in mlps]
    thread = threading.get_ident()

    def record(readings: list[Reading], mlp: Any, arguments: tuple[Tensor, ...], _: Any) -> None:
        if threading.get_ident() != thread:
            return
        a_BTF = mlp.adapter.encode(arguments[0]).detach()
        rows, columns, features = a_BTF.nonzero(as_tuple=True)
        if not cached:
            readings.clear()
        values = a_BTF[rows, columns, features]
        readings.append(Reading(a_BTF.shape[1], rows, columns, features, values))

    hooks = [
        mlp.register_forward_hook(partial(record, readings))
        for mlp, readings in zip(mlps, layers, strict=True)
    ]
    try:
        yield layers
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def generate_with_features(
    model: Any,
    generate: Callable[..., Any],
    inputs: Tensor | None,
    generation_config: Any,
    **arguments: Any,
) -> GenerateFeaturesOutput:
    """Call transformers' ``generate`` of a model and add the features; see ``AdaptedCausalLM``.

    Args:
        model: the model with adapters.
        generate: the method without features.
        inputs, generation_config, arguments: its arguments.

    Raises:
        UserError: the features cannot be assigned to the tokens that these arguments generate.
        RunError: the model's calls did not read the returned tokens.
    """
    ids = arguments.pop("input_ids", None) if inputs is None else inputs
    if not isinstance(ids, Tensor) or ids.ndim != 2 or arguments.get("inputs_embeds") is not None:
        raise UserError("output_features: expected input_ids [B, T] as the prompts of generate")
    if arguments.pop("return_dict_in_generate", True) is False:
        raise UserError(
            "output_features: the features are returned in a dictionary; pass "
            "return_dict_in_generate=True, or omit it"
        )
    # Hooks read the number of codes, which a compiled forward would not allow.
    options = {"return_dict_in_generate": True, "disable_compile": True}
    if generation_config is None:
        arguments |= options
    else:
        generation_config = copy.deepcopy(generation_config)
        generation_config.update(**options)
    settings, _ = model._prepare_generation_config(generation_config, **arguments)
    _check(model.adapted_mlps, settings, arguments)
    mask = arguments.pop("attention_mask", None)
    if mask is None:
        mask = _mask(ids, settings)
    with recorded(model.adapted_mlps, cached=settings.use_cache is not False) as layers:
        out = generate(ids, generation_config, attention_mask=mask, **arguments)
    real = _real(out.sequences, mask.bool(), settings)
    by_layer = [_codes(readings, real) for readings in layers]
    features = [list(codes) for codes in zip(*by_layer, strict=True)]
    return GenerateFeaturesOutput(**out, features=features)


def _check(mlps: Sequence[AdaptedMLP], settings: Any, arguments: dict[str, Any]) -> None:
    """Raise ``UserError`` where calls of the model do not read the returned tokens one by one."""
    mode = str(settings.get_generation_mode(arguments.get("assistant_model")).value)
    name = "cache" if "cache" in arguments else "past_key_values"  # from transformers 5.24 on
    cache = arguments.get(name)
    refused = {
        f"got {mode.replace('_', ' ')}": mode not in MODES,
        "got custom_generate": arguments.get("custom_generate") is not None,
        "got the paged cache": settings.cache_implementation == "paged",
        "got a guidance_scale, which reads other texts, too": settings.guidance_scale
        not in (None, 1),
        f"got {name} that hold tokens already": cache is not None and cache.get_seq_length() > 0,
    }
    for got, is_refused in refused.items():
        if is_refused:
            raise UserError(
                f"output_features: expected greedy search or sampling from the start of a text, "
                f"{got}; omit it, or read the finished text once more with max_new_tokens=1"
            )
    if any(mlp.mode != "replacement" for mlp in mlps):
        raise UserError(
            "output_features: expected the mode replacement, got hybrid, in which no adapter runs"
        )


def _ids_of(value: Any) -> list[int]:
    """Return token ids of a setting: none, one, or several."""
    if value is None:
        return []
    return [int(i) for i in torch.as_tensor(value).flatten()]


def _mask(ids: Tensor, settings: Any) -> Tensor:
    """Return the attention mask ``[B, T]`` that transformers infers where none is given."""
    pad, eos = _ids_of(settings.pad_token_id), _ids_of(settings.eos_token_id)
    if not pad or pad[0] in eos:
        return torch.ones_like(ids)
    return (ids != pad[0]).long()


def _real(sequences: Tensor, prompts: Tensor, settings: Any) -> Tensor:
    """Return which tokens the model has read and are no padding, bool ``[B, S - 1]``.

    A response ends with its first end-of-sequence token, or before the padding that follows
    another reason to stop.
    """
    prompts = prompts.to(sequences.device)
    prompts = prompts.repeat_interleave(len(sequences) // len(prompts), 0)
    responses = sequences[:, prompts.shape[1] :]
    eos, pad = _ids_of(settings.eos_token_id), _ids_of(settings.pad_token_id)
    is_end = torch.isin(responses, torch.tensor(eos, device=sequences.device, dtype=torch.int64))
    after_end = is_end.cumsum(1) - is_end.long() > 0
    if eos and pad:  # without an end-of-sequence token, transformers pads nothing
        padding = torch.isin(responses, torch.tensor(pad, device=sequences.device)) & ~is_end
        after_end |= padding.flip(1).cumprod(1).flip(1).bool()
    is_read = ~after_end[:, 1:]  # a token is read if the response goes on
    return torch.cat([prompts, is_read], 1)


def _codes(readings: list[Reading], real: Tensor) -> list[SparseCodes]:
    """Return the codes of each sequence, from the readings of one layer."""
    lengths = [reading.length for reading in readings]
    n_read, (n_sequences, n_expected) = sum(lengths), real.shape
    # transformers may draw one token more, and undo that step.
    if n_read not in (n_expected, n_expected + 1):
        raise RunError(
            f"output_features: expected that the model reads {n_expected} tokens of each sequence, "
            f"but its calls read {n_read}; logits processors that call the model, and "
            "token_healing, cannot be combined with output_features"
        )
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    rows = torch.cat([r.rows for r in readings])
    columns = torch.cat([r.columns + start for r, start in zip(readings, starts, strict=True)])
    features = torch.cat([r.features for r in readings])
    values = torch.cat([r.values for r in readings])
    real = nn.functional.pad(real.to(rows.device), (0, n_read - n_expected))
    selected = real[rows, columns]
    rows, order = rows[selected].sort(stable=True)
    counts = rows.bincount(minlength=n_sequences).tolist()
    split = (t[selected][order].split(counts) for t in (columns, features, values))
    return [SparseCodes(*parts) for parts in zip(*split, strict=True)]
