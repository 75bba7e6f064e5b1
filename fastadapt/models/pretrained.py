"""Read configuration, tokenizer, shards and MLPs of safetensors checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from fastadapt.errors import RunError, UserError
from fastadapt.io.documents import check, read_json
from fastadapt.io.names import check_name, typed_path
from fastadapt.io.tensors import check_tensor, open_tensors
from fastadapt.kernels.vector_math import resolve_functions
from fastadapt.models.architectures import ARCHITECTURES, Paths
from fastadapt.models.sources.low_rank import same_bits
from fastadapt.models.sources.text_tower import text_config, text_names, text_prefixes

_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 28)]
_Number = int | float | None
_Dtype = Annotated[
    str, msgspec.Meta(pattern=r"^(torch\.)?(auto|float16|bfloat16|float32|float64)$")
]


class ShardIndex(TypedDict):
    """Schema of ``model.safetensors.index.json``: the shard of each tensor."""

    weight_map: Annotated[dict[str, str], msgspec.Meta(min_length=1)]


class Rotary(TypedDict, total=False):
    """Schema of ``rope_parameters`` in ``config.json``, for all layers or per layer type."""

    rope_type: Annotated[str, msgspec.Meta(pattern="^[a-z0-9_]+$")]
    rope_theta: Annotated[float, msgspec.Meta(gt=0, le=2**53)]
    full_attention: Rotary | None
    sliding_attention: Rotary | None


#: Attention implementation of transformers. A name with a slash is a repository with code.
_Implementation = Annotated[str, msgspec.Meta(pattern="^[a-z0-9_]+$")]


class ModelFile(TypedDict, total=False):
    """Schema of the keys of ``config.json`` that determine sizes and types, with upper bounds.

    A value above its bound means a damaged file; building such a model would never finish.
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
    text_config: ModelFile | None


#: Safetensors' names of the dtypes of unquantised weights.
_STORED = ("F64", "F32", "BF16", "F16")

#: Files with a checkpoint's weights or its shard index; transformers prefers the first.
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")

#: Names of the embedding and the head in a causal language model.
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"

#: Files of which a folder with a tokenizer has at least one.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")

#: Configurations of the presets' models.
SHAPES = Path(__file__).parents[1] / "presets" / "shapes.json"


@contextmanager
def reading(role: str, source: str) -> Iterator[None]:
    """Turn errors raised while ``source`` is read into a one-line :class:`UserError`.

    ``role`` describes the source in the message. Errors of memory pass unchanged.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as e:
        raise UserError(
            f"{role} {source!r}: a safetensors file is truncated or damaged: {e}. Download it again"
        ) from e
    # transformers and tokenizers raise errors of any type for malformed files.
    except Exception as e:
        no_memory = isinstance(e, (torch.OutOfMemoryError, MemoryError))
        if isinstance(e, (UserError, RunError)) or no_memory or "not enough memory" in str(e):
            raise
        reason = " ".join(str(e).split())
        if len(reason.split()) < 2:  # the text of a KeyError is only the key
            reason = f"{type(e).__name__} {reason}".strip()
        raise UserError(f"{role} {source!r} cannot be loaded: {reason[:300]}") from e


def model_config(source: str, revision: str | None, trust: bool) -> Any:
    """Return transformers' configuration of a local folder or hub id.

    For a multimodal model, this is the configuration of its text model. Where the weights are on
    this machine, as in transformers, a head that differs from the embedding is not tied to it,
    whatever ``config.json`` says, and a missing head is, if the outer configuration ties it.

    The attention implementation is cleared and left to the caller: in ``config.json`` it can name
    code on the hub, which transformers would run even without ``trust``.

    Raises:
        UserError: the source cannot be read, is quantised, or names a file for its weights.
    """
    from transformers import AutoConfig

    typed_path(source, "model")  # a hub id also fits a path's length
    _check_no_file(source, "model")
    _check_format(Path(source))
    _check_folder(source, "model")
    with reading("model", source):
        file = fetch(source, "config.json", revision)
        if file is not None:
            keys = read_json(file, ModelFile, constants=True)
            given = [*keys.items(), *(keys.get("text_config") or {}).items()]
            implementations = {key: value for key, value in given if "implementation" in key}
            check(implementations, dict[str, _Implementation | None], str(file))
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"model {source!r} is quantised (quantization_config in its config.json); expected "
            "unquantised weights. Give the model before quantisation"
        )
    named = getattr(config, "transformers_weights", None)
    if named not in (None, WEIGHT_FILES[0]):
        raise UserError(
            f"model {source!r} names its weights in its config.json (transformers_weights "
            f"{named!r}), which is not supported. Rename the file to model.safetensors and delete "
            "the key"
        )
    outer_ties = getattr(config, "tie_word_embeddings", False)
    config = text_config(config, file is None or "tie_word_embeddings" in keys)
    if outer_ties or getattr(config, "tie_word_embeddings", False):
        has_head = _has_own_head(source, revision)
        if has_head or (outer_ties and has_head is not None):
            config.tie_word_embeddings = not has_head
    config._attn_implementation = config._experts_implementation = None
    config._commit_hash = commit_of(file)
    return config


def _has_own_head(source: str, revision: str | None) -> bool | None:
    """Return whether weights on this machine have a head that differs from the embedding.

    Return None if the embedding is not on this machine. Nothing is downloaded. What is wrong with
    the weights is reported when they are loaded.
    """
    from safetensors import safe_open
    from transformers.utils import cached_file

    def find(source: str, name: str, revision: str | None) -> Path | None:
        path = cached_file(
            source,
            name,
            revision=revision,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if path is None else Path(path)

    both = []
    try:
        files = _tensor_names(_tensor_files(source, revision, find))
        stored = {name: place for place, name in text_names(files, source).items()}
        if _EMBEDDING not in stored:
            return None
        if _HEAD not in stored:
            return False
        for place in (stored[_EMBEDDING], stored[_HEAD]):
            with reading("model", source), safe_open(files[place], framework="pt") as file:
                both.append(file.get_tensor(place))
    except UserError:
        return None
    embedding, head = both
    return embedding.itemsize > 1 and not same_bits(embedding, head)


def commit_of(file: Path | None) -> str | None:
    """Return the commit of a file in the hub's cache; None for any other file.

    Example:
        >>> commit_of(Path("hub/models--a--b/snapshots/c0ffee/config.json"))
        'c0ffee'
    """
    # Configurations of transformers 5.22 do not record it.
    if file is None or file.parent.parent.name != "snapshots":
        return None
    return file.parent.name


def _check_no_file(source: str, role: str) -> None:
    """Raise ``UserError`` if a model's name is the path of a file, before the hub is asked."""
    path = Path(source).expanduser()
    if path.is_file():
        _check_format(path)
        raise UserError(
            f"{role} {source!r}: expected a folder or a hub id, got a file; give its folder, "
            f"{str(path.parent)!r}"
        )


def _check_folder(source: str, what: str) -> None:
    """Refuse a source that is written as a path, and is no folder."""
    looks_local = source.startswith(("/", ".", "~")) or source.count("/") > 1
    if looks_local and not Path(source).is_dir():
        raise UserError(
            f"{what} {source!r} cannot be loaded: no such folder; expected a folder or a hub id"
        )


def _check_format(path: Path) -> None:
    """Raise ``UserError`` for weights that are not safetensors; say how to convert them."""
    names = sorted(file.name for file in path.iterdir()) if path.is_dir() else [path.name]
    if any(name in names for name in WEIGHT_FILES):
        return
    if gguf := [name for name in names if name.endswith(".gguf")]:
        raise UserError(
            f"model {str(path)!r}: {gguf[0]} has GGUF weights; only safetensors checkpoints are "
            "read. Convert it with transformers (gguf_file=...) and save_pretrained, and give that "
            "folder"
        )
    if pickled := [name for name in names if fnmatch(name, "pytorch_model*.bin")]:
        raise UserError(
            f"model {str(path)!r}: {pickled[0]} holds pickled weights, which can run code; only "
            "safetensors checkpoints are read. Load the model with transformers and save it again "
            "(save_pretrained)"
        )


def shipped_config(source: str) -> Any | None:
    """Return transformers' configuration of a preset's hub model without network access.

    The configuration lacks keys without influence on shapes (positions, rotary bases), so it only
    serves to plan runs. Return None for models of no preset.
    """
    from transformers import AutoConfig

    known = read_json(SHAPES, dict[str, dict[str, Any]]).get(source)
    return None if known is None else AutoConfig.for_model(**known)


def load_tokenizer(source: str, revision: str | None, trust: bool) -> Any:
    """Load the tokenizer of a local folder or hub id."""
    from transformers import AutoTokenizer

    typed_path(source, "tokenizer")
    _check_no_file(source, "tokenizer")
    _check_folder(source, "tokenizer of")
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZERS):
        raise UserError(
            f"{source} holds no tokenizer (none of {', '.join(_TOKENIZERS)}); give the folder or "
            "hub id of one (--pair.tokenizer; fastadapt data prepare: --tokenizer)"
        )
    with reading("tokenizer of", source):
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text as it is, with the special tokens that the tokenizer adds.

    A text that begins with the BOS itself, as a chat template writes it, gets no second one.
    """
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    bos = added_bos(tokenizer)
    return ids[1:] if bos and ids[:2] == bos * 2 else ids


def added_bos(tokenizer: Any) -> list[int]:
    """Return the BOS that the tokenizer adds to every text, as a list of one id or none."""
    ids = tokenizer("", verbose=False)["input_ids"]
    return list(ids[:1]) if ids and ids[0] == tokenizer.bos_token_id else []


def fetch(source: str, name: str, revision: str | None) -> Path | None:
    """Return the local path of a file in a folder or hub repository, or None if it is missing.

    Without a connection to the hub, a repository in its cache has the files that the cache holds.

    Raises:
        UserError: the source is a file, the folder or repository does not exist, or the hub cannot
            be reached and its cache holds nothing of the repository.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError
    from transformers.utils import cached_file

    _check_no_file(source, "model")
    with reading("model", source):
        try:
            path = cached_file(source, name, revision=revision)
        except OSError as error:
            if isinstance(error.__cause__, LocalEntryNotFoundError):
                _check_cached(source, revision)
                return None
            # A missing file gives None, any other error is raised again.
            path = cached_file(
                source, name, revision=revision, _raise_exceptions_for_missing_entries=False
            )
    return None if path is None else Path(path)


def _check_cached(source: str, revision: str | None) -> None:
    """Raise ``UserError`` if the hub's cache on this machine holds nothing of a repository."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot_download(source, revision=revision, local_files_only=True)
    except LocalEntryNotFoundError:
        offline = "HF_HUB_OFFLINE is set"
        if not constants.HF_HUB_OFFLINE:
            offline = f"{constants.ENDPOINT} cannot be reached"
        version = "" if revision is None else f" in revision {revision!r}"
        raise UserError(
            f"model {source!r}{version} cannot be loaded: no such folder, the hub's cache "
            f"({constants.HF_HUB_CACHE}) does not hold it, and {offline}. Connect to the hub, or "
            "give a local folder"
        ) from None


def tensor_files(source: str, revision: str | None) -> dict[str, Path]:
    """Return the file of every shard (safetensors file) of a checkpoint, by name.

    A single file takes precedence over an index, as in transformers: saving a model in one file
    leaves the index of its earlier shards behind.

    Raises:
        UserError: the weights or a shard are missing, an index names a file outside its folder, a
            tensor is quantised, or the source holds a PEFT adapter, too, which transformers would
            read instead of the weights.
    """
    files = _tensor_files(source, revision)
    if fetch(source, "adapter_config.json", revision) is not None:
        raise UserError(
            f"{source}: adapter_config.json stands beside the weights, so transformers would load "
            "the PEFT adapter and the model that it names instead. Merge the adapter and delete "
            "this file; of a hub repository, give a folder of its other files (hf download)"
        )
    for path in files.values():
        with reading("model", str(path)), open_tensors(path) as file:
            for name in file.keys():  # noqa: SIM118
                dtype = file.get_slice(name).get_dtype()
                if dtype not in _STORED:
                    raise UserError(
                        f"{path}: tensor {name} is stored as {dtype} (a quantised checkpoint); "
                        f"expected {', '.join(_STORED)}. Give the model before quantisation"
                    )
    return files


def _tensor_names(files: Mapping[str, Path]) -> dict[str, Path]:
    """Return the file of every tensor of shards, by the tensor's name."""
    names: dict[str, Path] = {}
    for file in files.values():
        with reading("model", str(file)), open_tensors(file) as shard:
            names |= dict.fromkeys(shard.keys(), file)
    return names


class Stored(NamedTuple):
    """File of a tensor, and the tensor's name in it."""

    file: Path
    name: str


def stored_tensors(source: str, revision: str | None) -> dict[str, Stored]:
    """Return the file of each tensor of a causal language model, by the name in the model.

    Of a multimodal checkpoint, these are the tensors of the text model.

    Raises:
        UserError: see :func:`tensor_files`.
    """
    files = _tensor_names(tensor_files(source, revision))
    return {
        name: Stored(files[stored], stored) for stored, name in text_names(files, source).items()
    }


def _tensor_files(
    source: str, revision: str | None, find: Callable[..., Path | None] = fetch
) -> dict[str, Path]:
    whole, shards = WEIGHT_FILES
    single = find(source, whole, revision)
    if single is not None:
        return {whole: single}
    index = find(source, shards, revision)
    if index is None:
        raise UserError(
            f"{source}: no model.safetensors found; only safetensors checkpoints are read"
        )
    names = sorted(set(read_json(index, ShardIndex)["weight_map"].values()))
    files = {}
    for name in names:
        check_name(name, f"{index}: weight_map")
        file = find(source, name, revision)
        if file is None:
            raise UserError(
                f"{source}: shard {name!r}, which the index names, is missing; download it again"
            )
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
    mlps: bool = True,
) -> Any:
    """Load transformers' causal language model of a checkpoint, in eval mode.

    Args:
        source, revision: the checkpoint.
        device, dtype: of the weights.
        attention: transformers' name of the attention implementation.
        trust: run Python code that comes with the model.
        role: the checkpoint's name in error messages.
        besides: names of tensors that the checkpoint may hold beside the model's.
        mlps: load the MLPs. Without, their weights are not read, and the MLP of each block is None,
            until the caller sets another one.

    Raises:
        UserError: a weight is missing, misshapen or unexpected, or the head has a bias.
    """
    from transformers import AutoModelForCausalLM

    resolve_functions()
    stored = _tensor_names(tensor_files(source, revision))
    prefixes = text_prefixes(stored, source)
    names = text_names(stored, source)
    besides = {*besides, *(stored.keys() - names.keys())}
    config = model_config(source, revision, trust)
    known: Any = AutoModelForCausalLM
    if not mlps:
        paths = ARCHITECTURES[config.model_type]
        known = _without_mlps(AutoModelForCausalLM._model_mapping[type(config)], paths)
        inside = re.compile(rf"{paths.decoder}\.{paths.layers}\.\d+\.{paths.mlp}\.")
        besides |= {key for pair in names.items() if inside.match(pair[1]) for key in pair}
    with reading(role, source), _no_bar(), _errors_only() if besides else nullcontext():
        loaded: Any = known.from_pretrained(
            source,
            config=config,
            revision=revision,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=trust,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # the check below names the weight
            output_loading_info=True,
            key_mapping={f"^{re.escape(part)}": name for part, name in prefixes.items()} or None,
            **({"device_map": {"": device}} if device.type != "cpu" else {}),
        )
    model, info = loaded
    for key in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if keys := sorted(map(str, set(info.get(key, ())) - set(besides))):
            raise UserError(f"{role} {source}: {len(keys)} {key.replace('_', ' ')}: {keys[:3]}")
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UserError(f"{role} {source}: an output head (lm_head) with a bias is not supported")
    if dtype == torch.float64 and attention == "eager":
        _bound_masks(model)
    return model.eval()


def _without_mlps(model: Any, paths: Paths) -> Any:
    """Return a subclass of one of transformers' causal language models whose blocks lack an MLP."""

    class WithoutMLPs(model):
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            for block in getattr(getattr(self, paths.decoder), paths.layers):
                setattr(block, paths.mlp, None)

    return WithoutMLPs


def _bound_masks(model: nn.Module) -> None:
    """Clamp the masks of eager attention in float64 to the smallest float32 number.

    transformers adds the smallest float64 number to masked scores and computes the softmax in
    float32, where that number is minus infinity. A row that attends to padding only would become
    NaN, and one block later every row would.
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
def _no_bar() -> Iterator[None]:
    """Hide transformers' progress bar of reading weights, which are on this machine already."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _errors_only() -> Iterator[None]:
    """Silence transformers' table of unexpected tensors, which the caller expects.

    Faults of the checkpoint are still raised, from the loading info.
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
    beside: nn.Module | None = None,
) -> nn.ModuleList:
    """Load the MLP modules of a checkpoint, one per layer; read no other weights.

    Args:
        source, revision: the checkpoint.
        config: the checkpoint's :func:`model_config`.
        device, dtype: of the weights. On the meta device no weight is read.
        trust: run Python code that comes with the model.
        role: the checkpoint's name in error messages.
        beside: a model on the same device. Weights with the bits of its weights of the same names
            become its parameters, so that they are in memory once.

    Raises:
        UserError: an MLP weight is missing or misshapen, or a file is damaged.
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
    ours = {} if beside is None else dict(beside.named_parameters())
    places = {
        name: place for name, place in stored_tensors(source, revision).items() if name in wanted
    }
    for file in sorted({place.file for place in places.values()}):
        with (
            reading(role, str(file)),
            safe_open(file, framework="pt", device=str(device)) as shard,
        ):
            for name in (name for name, place in places.items() if place.file == file):
                tensor = shard.get_tensor(places[name].name)
                check_tensor(tensor, str(file), places[name].name)
                tensor = tensor.to(dtype)
                same = name in ours and same_bits(ours[name], tensor)
                tensors[name] = ours[name] if same else tensor
    if missing := sorted(wanted - set(tensors)):
        raise UserError(f"{role} {source}: {len(missing)} MLP weights are missing: {missing[:3]}")
    for prefix, mlp in zip(prefixes, mlps, strict=True):
        weights = {name: tensors[prefix + name] for name in mlp.state_dict()}
        for name, parameter in mlp.state_dict().items():
            if weights[name].shape != parameter.shape:
                raise UserError(
                    f"{role} {source}: {prefix}{name}: expected {tuple(parameter.shape)}, "
                    f"got {tuple(weights[name].shape)}"
                )
        mlp.load_state_dict(weights, assign=True)
    return mlps.eval()
