"""Read checkpoints: configuration, tokenizer, shards, and the MLPs alone. Only safetensors."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from fastadapt.errors import RunError, UserError
from fastadapt.io.documents import check, read_json
from fastadapt.io.names import check_name, typed_path
from fastadapt.io.tensors import check_tensor, open_tensors

_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 28)]
_Number = int | float | None
_Dtype = Annotated[
    str, msgspec.Meta(pattern=r"^(torch\.)?(auto|float16|bfloat16|float32|float64)$")
]


class ShardIndex(TypedDict):
    """``model.safetensors.index.json``: the shard of each tensor."""

    weight_map: Annotated[dict[str, str], msgspec.Meta(min_length=1)]


class Rotary(TypedDict, total=False):
    """``rope_parameters`` of ``config.json``, of all layers or of each kind of layer."""

    rope_type: Annotated[str, msgspec.Meta(pattern="^[a-z0-9_]+$")]
    rope_theta: Annotated[float, msgspec.Meta(gt=0, le=2**53)]
    full_attention: Rotary | None
    sliding_attention: Rotary | None


#: One of transformers' own; a name with a slash is that of a repository, whose code would run.
_Implementation = Annotated[str, msgspec.Meta(pattern="^[a-z0-9_]+$")]


class ModelFile(TypedDict, total=False):
    """The keys of ``config.json`` that sizes and kinds follow from, bounded.

    A model of more layers or of a wider stream than these is a damaged file, and building it would
    take for ever.
    """

    model_type: str
    architectures: list[str] | None
    hidden_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    intermediate_size: _Size
    vocab_size: _Size
    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=10_000)]
    num_attention_heads: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    num_key_value_heads: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] | None
    head_dim: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] | None
    max_position_embeddings: Annotated[int, msgspec.Meta(ge=1, le=2**53)]
    max_window_layers: int
    sliding_window: Annotated[int, msgspec.Meta(ge=1, le=2**53)] | None
    use_sliding_window: bool
    layer_types: list[str] | None
    rope_theta: _Number
    rope_scaling: dict[str, Any] | None
    rope_parameters: Rotary | None
    partial_rotary_factor: _Number
    rms_norm_eps: float
    initializer_range: float
    attention_dropout: float
    hidden_act: str
    tie_word_embeddings: bool
    use_cache: bool
    attention_bias: bool
    mlp_bias: bool
    bos_token_id: int | None
    pad_token_id: int | None
    eos_token_id: int | list[int] | None
    dtype: _Dtype | None
    torch_dtype: _Dtype | None


@dataclass(frozen=True)
class Paths:
    """Attribute paths of an architecture's parts, from the causal language model down.

    ``attention`` is the implementation to use where flash-attn is not: ``eager`` for Gemma 2, whose
    soft-capped attention scores torch's fused attention cannot make.
    """

    decoder: str = "model"
    layers: str = "layers"
    mlp: str = "mlp"
    norm: str = "norm"
    attention: str = "sdpa"


#: The architectures whose gradients and modes are tested.
ARCHITECTURES: Mapping[str, Paths] = {
    "qwen2": Paths(),
    "llama": Paths(),
    "gemma2": Paths(attention="eager"),
    "gemma3_text": Paths(),
    "mistral": Paths(),
    "olmo2": Paths(),
    "phi3": Paths(),
    "qwen3": Paths(),
}


#: Dtypes, as safetensors calls them, of tensors that hold weights and no codes of weights.
_STORED = ("F64", "F32", "BF16", "F16")

#: Files that hold a checkpoint's weights or name its shards; transformers takes the first of them.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")

#: Shapes of the presets' models.
SHAPES = Path(__file__).parents[1] / "presets" / "shapes.json"


@contextmanager
def reading(what: str, source: str) -> Iterator[None]:
    """Turn what a missing, broken or misshapen source raises into one line that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as e:
        raise UserError(
            f"{what} {source!r}: a safetensors file is truncated or damaged: {e}"
        ) from e
    # On files that they did not expect, transformers and tokenizers raise errors of any type.
    except Exception as e:
        no_memory = isinstance(e, (torch.OutOfMemoryError, MemoryError))
        if isinstance(e, (UserError, RunError)) or no_memory or "not enough memory" in str(e):
            raise
        reason = " ".join(str(e).split())
        if len(reason.split()) < 2:  # a KeyError's is the key alone
            reason = f"{type(e).__name__} {reason}".strip()
        raise UserError(f"{what} {source!r} cannot be loaded: {reason[:300]}") from e


def model_config(source: str, revision: str | None, trust: bool) -> Any:
    """transformers' configuration of a local folder or hub id.

    Its implementation of attention is the caller's to choose: a ``config.json`` may name code of
    the hub there, with or without ``trust`` in the code of the model.
    """
    from transformers import AutoConfig

    looks_local = source.startswith(("/", ".", "~")) or source.count("/") > 1
    typed_path(source, "model")  # a hub id has no more letters than a path may have
    if looks_local and not Path(source).is_dir():
        raise UserError(
            f"model {source!r} cannot be loaded: no such folder; expected one, or a hub id"
        )
    with reading("model", source):
        if (file := fetch(source, "config.json", revision)) is not None:
            keys = read_json(file, ModelFile, constants=True)
            chosen = {key: value for key, value in keys.items() if "implementation" in key}
            check(chosen, dict[str, _Implementation | None], str(file))
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"model {source!r} is quantised (quantization_config in its config.json), and its "
            "stored numbers are no weights. Give the model before it was quantised"
        )
    named = getattr(config, "transformers_weights", None)
    if named not in (None, _WEIGHTS[0]):
        raise UserError(
            f"model {source!r} names its weights in its config.json (transformers_weights "
            f"{named!r}), which is not supported. Rename the file to model.safetensors, and take "
            "the key out"
        )
    config._attn_implementation = config._experts_implementation = None
    return config


def shipped_config(source: str) -> Any | None:
    """transformers' configuration of a hub model that a preset names: its shapes, offline.

    For plans alone: what has no influence on shapes (positions, rotary bases) is not in it. None
    for other models.
    """
    from transformers import AutoConfig

    known = read_json(SHAPES, dict[str, dict[str, Any]]).get(source)
    return None if known is None else AutoConfig.for_model(**known)


def load_tokenizer(source: str, revision: str | None, trust: bool) -> Any:
    """The tokenizer of a local folder or hub id."""
    from transformers import AutoTokenizer

    typed_path(source, "tokenizer")
    with reading("tokenizer of", source):
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust)


def fetch(source: str, name: str, revision: str | None) -> Path | None:
    """Local path of one file of a folder or hub repository, or None where it has none.

    Raises:
        UserError: there is no such folder or repository, nor can there be one of this name.
    """
    from transformers.utils import cached_file

    with reading("model", source):
        found = cached_file(
            source, name, revision=revision, _raise_exceptions_for_missing_entries=False
        )
    return None if found is None else Path(found)


def tensor_files(source: str, revision: str | None) -> dict[str, Path]:
    """File of every shard, by name. Shards named by an index may not lie outside their folder.

    As in transformers, a single file goes before an index: saving a model again leaves the index of
    the shards that it had before.

    Raises:
        UserError: there are no weights, a shard is missing, a tensor is quantised, or a PEFT
            adapter stands beside the weights, which transformers would read in their place.
    """
    files = _tensor_files(source, revision)
    if (Path(source) / "adapter_config.json").is_file():
        raise UserError(
            f"{source}: adapter_config.json stands beside the weights; transformers would read a "
            "PEFT adapter and the model that it names in their place. Merge the adapter, and "
            "delete this file"
        )
    for path in files.values():
        with reading("model", str(path)), open_tensors(path) as file:
            for name in file.keys():  # noqa: SIM118
                dtype = file.get_slice(name).get_dtype()
                if dtype not in _STORED:
                    raise UserError(
                        f"{path}: tensor {name} is stored as {dtype}, which is no weight but a "
                        "code of one (a quantised checkpoint). Give the model before it was "
                        f"quantised; expected {', '.join(_STORED)}"
                    )
    return files


def _tensor_files(source: str, revision: str | None) -> dict[str, Path]:
    whole, shards = _WEIGHTS
    single = fetch(source, whole, revision)
    if single is not None:
        return {whole: single}
    index = fetch(source, shards, revision)
    if index is None:
        raise UserError(
            f"{source}: no model.safetensors found; only safetensors checkpoints are read"
        )
    names = sorted(set(read_json(index, ShardIndex)["weight_map"].values()))
    files = {}
    for name in names:
        check_name(name, f"{index}: weight_map")
        file = fetch(source, name, revision)
        if file is None:
            raise UserError(f"{source}: shard {name!r} named by the index is missing")
        files[name] = file
    return files


def load_causal_lm(
    source: str,
    revision: str | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    trust: bool,
    role: str = "target",
    besides: Collection[str] = (),
) -> Any:
    """transformers' causal language model of a checkpoint, in eval mode, no weight left over.

    ``besides`` are the tensors that the checkpoint may hold and the model does not; ``role`` is the
    checkpoint's name in messages.
    """
    from transformers import AutoModelForCausalLM

    tensor_files(source, revision)
    config = model_config(source, revision, trust)
    with reading(role, source), _no_report() if besides else nullcontext():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            revision=revision,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=trust,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that the check below names the weight
            output_loading_info=True,
            **({"device_map": {"": device}} if device.type != "cpu" else {}),
        )
    model, info = loaded
    for key in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if odd := sorted(map(str, set(info.get(key, ())) - set(besides))):
            raise UserError(f"{role} {source}: {len(odd)} {key.replace('_', ' ')}: {odd[:3]}")
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UserError(f"{role} {source}: a head with a bias is not supported")
    if dtype == torch.float64 and attention == "eager":
        _bound_masks(model)
    return model.eval()


def _bound_masks(model: nn.Module) -> None:
    """Bound the masks of eager attention in float64 by float32's lowest number.

    transformers adds the lowest float64 to masked scores and takes the softmax in float32, where
    that is minus infinity: a row that sees padding alone would be NaN, and so, a block later, would
    be every row.
    """

    def bound(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.is_floating_point():
            lowest = torch.finfo(torch.float32).min
            kwargs = {**kwargs, "attention_mask": mask.clamp(min=lowest)}
        return args, kwargs

    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "self_attn":
            module.register_forward_pre_hook(bound, with_kwargs=True)


@contextmanager
def _no_report() -> Iterator[None]:
    """Without transformers' table of tensors that it does not know, which are known to the caller.

    What is wrong with a checkpoint is raised from the same facts.
    """
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def load_mlps(
    source: str,
    revision: str | None,
    config: Any,
    *,
    device: torch.device,
    dtype: torch.dtype,
    trust: bool,
    role: str = "base",
) -> nn.ModuleList:
    """The MLP modules of a checkpoint, one per layer, with their weights; nothing else is read.

    On the meta device they are shapes, and nothing is read.
    ``config`` is the checkpoint's :func:`model_config`; ``role`` is its name in messages.
    """
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    paths = ARCHITECTURES[config.model_type]
    with reading(role, source), torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    layers = getattr(getattr(skeleton, paths.decoder), paths.layers)
    mlps = nn.ModuleList(getattr(layer, paths.mlp) for layer in layers)
    prefixes = [f"{paths.decoder}.{paths.layers}.{i}.{paths.mlp}." for i in range(len(mlps))]
    wanted = {
        prefix + name
        for prefix, mlp in zip(prefixes, mlps, strict=True)
        for name in mlp.state_dict()
    }
    if device.type == "meta":
        return mlps.to(dtype).eval()
    tensors: dict[str, Tensor] = {}
    for file in tensor_files(source, revision).values():
        with (
            reading(role, str(file)),
            safe_open(file, framework="pt", device=str(device)) as shard,
        ):
            for name in wanted & set(shard.keys()):
                tensor = shard.get_tensor(name)
                check_tensor(tensor, str(file), name)
                tensors[name] = tensor.to(dtype)
    if missing := sorted(wanted - set(tensors)):
        raise UserError(f"{role} {source}: {len(missing)} MLP weights are missing: {missing[:3]}")
    for prefix, mlp in zip(prefixes, mlps, strict=True):
        own = {name: tensors[prefix + name] for name in mlp.state_dict()}
        for name, parameter in mlp.state_dict().items():
            if own[name].shape != parameter.shape:
                raise UserError(
                    f"{role} {source}: {prefix}{name}: expected {tuple(parameter.shape)}, "
                    f"got {tuple(own[name].shape)}"
                )
        mlp.load_state_dict(own, assign=True)
    return mlps.eval()
