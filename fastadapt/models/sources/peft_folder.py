"""Read a PEFT folder: its settings, the shapes of its tensors, and the base that it names.

A PEFT folder holds ``adapter_config.json`` and ``adapter_model.safetensors``: the low-rank
difference between a fine-tuned model and its base. No tensor is read here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from torch import nn
from typing_extensions import TypedDict

from fastadapt.errors import UserError
from fastadapt.io.documents import Name, read_json
from fastadapt.io.tensors import open_tensors
from fastadapt.models.architectures import ARCHITECTURES, Paths
from fastadapt.models.pretrained import WEIGHT_FILES, commit_of, fetch
from fastadapt.organism import resolve

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of every tensor's name in a PEFT folder
_WRAPPERS = re.compile(r"\.(modules_to_save|(token_adapter\.)?base_layer)\.")
#: Mark of the base's tensor in a place where the adapter has a saved module.
ORIGINAL = ".original_module."
_Rank = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
_Names = list[str] | str | None


class AdapterFile(TypedDict, total=False):
    """Schema of the keys of ``adapter_config.json`` that are read."""

    peft_type: str
    base_model_name_or_path: Name | None
    revision: Name | None
    r: _Rank
    lora_alpha: float
    target_modules: _Names
    exclude_modules: _Names
    modules_to_save: list[str] | None
    layers_to_transform: list[int] | int | None
    layers_pattern: _Names
    rank_pattern: dict[str, _Rank] | None
    alpha_pattern: dict[str, float] | None
    trainable_token_indices: list[int] | dict[str, list[int]] | None
    bias: str
    init_lora_weights: bool | str | None
    use_rslora: bool
    use_dora: bool
    ensure_weight_tying: bool


#: Settings that determine which layers have which low-rank parts. All others are not passed on.
READ = tuple(
    name
    for name in AdapterFile.__annotations__
    if name not in ("peft_type", "base_model_name_or_path", "revision", "init_lora_weights")
)
#: Settings whose layers compute something else than base + low-rank.
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
)
#: Initialisations that change the base's weights too, so that the folder is not a difference.
_CHANGES_BASE = re.compile("pissa|olora|corda|loftq|lora_ga", re.IGNORECASE)
_QUANTISED = re.compile(
    r"gptq|awq|gguf|eetq|hqq|(?<!\d)[48]-?bit"
    r"|(?<![a-z0-9])(bnb-?\d?|[qu]?int[48]|(mx|nv)?fp[48]|nf4|q\d_k)(?!\d)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class PeftFolder:
    """A PEFT folder, or hub repository, without its tensors.

    Attributes:
        source, revision: the folder or hub id, and its revision.
        settings: the checked contents of ``adapter_config.json``.
        weights: path of ``adapter_model.safetensors``.
        shapes: shape of every tensor, by its name in the base model.
    """

    source: str
    revision: str | None
    settings: Mapping[str, Any]
    weights: Path
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def base(self) -> str | None:
        """The base that the folder names, a hub id or a path."""
        name: str | None = self.settings.get("base_model_name_or_path")
        return name or None

    @property
    def commit(self) -> str | None:
        """The commit, if the source is a hub repository."""
        return commit_of(self.weights)

    def has_tokenizer(self) -> bool:
        """Return whether the folder holds a tokenizer beside the adapter."""
        return fetch(self.source, "tokenizer_config.json", self.revision) is not None

    def unties(self) -> bool:
        """Return whether the target's embedding and head have a weight each, also over a tied base.

        Low-rank parts of both, which ``ensure_weight_tying`` keeps equal, are merged into one each.
        """
        outer = ("embed_tokens", "lm_head")
        changed = [name for name, part in map(_split, self.shapes) if part.startswith("lora_")]
        if not self.settings.get("ensure_weight_tying"):
            changed += self.settings.get("modules_to_save") or ()
        trained = self.settings.get("trainable_token_indices")
        by_end: dict[str, Any] = dict.fromkeys(outer)
        for name, indices in trained.items() if isinstance(trained, dict) else ():
            by_end |= {end: indices for end in outer if name.endswith(end)}
        # Tokens of the embedding alone are those of a tied head, too.
        own_tokens = by_end["lm_head"] not in (None, by_end["embed_tokens"])
        return own_tokens or any(name.endswith(outer) for name in changed)

    def rows(self, vocab_size: int) -> int:
        """Return the rows of the target's embedding, for a base with ``vocab_size`` rows.

        Raises:
            UserError: tensors disagree about the number of rows.
        """
        sizes: dict[int, str] = {}
        last = -1
        for name, shape in self.shapes.items():
            module, part = _split(name)
            if module.endswith(("embed_tokens", "lm_head")):
                if part == "weight":
                    sizes[shape[0]] = name
                elif part == "lora_embedding_A":
                    sizes[shape[-1]] = name
        trained = self.settings.get("trainable_token_indices") or ()
        for indices in trained.values() if isinstance(trained, dict) else (trained,):
            last = max([last, *indices])
        if len(sizes) > 1:
            text = " and ".join(f"{n} in {name}" for n, name in sorted(sizes.items()))
            raise UserError(f"{self.weights}: the vocabulary has {text}; expected one size")
        rows = next(iter(sizes), max(vocab_size, last + 1))
        if last >= rows:
            raise UserError(
                f"{self.source}: trainable_token_indices: {last} is beyond the {rows} rows of the "
                "embedding"
            )
        return rows

    def check_mlps(self) -> None:
        """Check that the folder changes an MLP.

        Raises:
            UserError: the MLPs of target and base are equal.
        """
        mlps = {f".{paths.mlp}." for paths in ARCHITECTURES.values()}
        if not any(mlp in name for name in self.shapes for mlp in mlps):
            parts = sorted({_split(name)[0].rpartition(".")[2] for name in self.shapes})
            raise UserError(
                f"target {self.source}: the adapter changes {', '.join(parts)} and no MLP, so "
                "target and base have equal MLPs. There is no MLP difference that transcoder "
                "adapters could learn"
            )

    def check_fits(self, model: Any, base: str) -> None:
        """Check every tensor's shape against the base's.

        Args:
            model: the base on the meta device, with the target's number of embedding rows.
            base: name of the base, for messages.

        Raises:
            UserError: the adapter is one of another base.
        """
        if any(".language_model." in f".{name}" for name in self.shapes):
            raise UserError(
                f"target {self.source} is an adapter of a multimodal model, of which only the text "
                "model is read. Merge it into its base (peft: merge_and_unload, save_pretrained) "
                "and give that folder"
            )
        for name, shape in sorted(self.shapes.items()):
            expected = _expected_shape(model, *_split(name), shape)
            if expected != shape:
                fits = "no such part" if expected is None else f"a part for {list(expected)}"
                other = f"the base that {CONFIG} names: {self.base or 'none'}"
                if self.base is not None and is_quantised(self.base):
                    other = f"the model of which {self.base} is the quantised form"
                raise UserError(
                    f"target {self.source} is not an adapter of base {base}: tensor {name} has "
                    f"shape {list(shape)}, and the base has {fits}. Give {other}"
                )

    def ranks(self, paths: Paths) -> Iterator[tuple[str, int, bool]]:
        """Yield the layers of blocks that the folder changes: name, rank, whether it is DoRA.

        The rank is 0 if the folder holds the layer's whole weight (``modules_to_save``).
        """
        inside = re.compile(rf"{paths.decoder}\.{paths.layers}\.\d+\.")
        for name, shape in self.shapes.items():
            module, part = _split(name)
            if part == "lora_A.weight" and inside.match(module):
                dora = any(f"{module}.{gain}" in self.shapes for gain in _MAGNITUDES)
                yield module, shape[0], dora
            elif part == "weight" and inside.match(module):
                yield module, 0, False


_MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight")
_PARTS = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_embedding_A",
    "lora_embedding_B",
    "token_adapter.trainable_tokens_delta",
    *_MAGNITUDES[::-1],
    "weight",
    "bias",
)


def _split(name: str) -> tuple[str, str]:
    """Split a tensor's name into its module and its part, such as ``lora_A.weight``."""
    for part in _PARTS:
        if name.endswith(f".{part}"):
            return name.removesuffix(f".{part}"), part
    return name, ""


def _expected_shape(
    model: Any, name: str, part: str, shape: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Return the shape that the base requires of a tensor; ranks are taken from ``shape``."""
    try:
        module = model.get_submodule(name)
        weight = getattr(module, part if part == "bias" else "weight")
        n_out, n_in = (*module.weight.shape, 1)[:2]
    except AttributeError:
        return None
    free = {0: shape[0], 1: shape[-1]}
    expected: dict[str, tuple[int, ...]] = {
        "lora_A.weight": (free[0], n_in),
        "lora_B.weight": (n_out, free[1]),
        "lora_embedding_A": (free[0], n_out),
        "lora_embedding_B": (n_in, free[1]),
        "token_adapter.trainable_tokens_delta": (free[0], n_in),
        # DoRA of an embedding has a magnitude for each column.
        **dict.fromkeys(_MAGNITUDES, (n_in if isinstance(module, nn.Embedding) else n_out,)),
    }
    return expected.get(part) or (None if weight is None or not part else tuple(weight.shape))


def find_peft(source: str, revision: str | None) -> PeftFolder | None:
    """Return the PEFT folder at a local path or hub id; None for any other source.

    A folder with the weights of a whole model is none, nor is one that cannot be read.

    Raises:
        UserError: the adapter is of a kind that is not supported, or a file is damaged.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        path = folder / CONFIG
        if not path.is_file() or any((folder / name).is_file() for name in WEIGHT_FILES):
            return None
    else:
        if os.path.isabs(source) or source.startswith((".", "~")) or source.count("/") > 1:
            return None  # a path at which nothing is
        fetched = fetch(source, CONFIG, revision)
        if fetched is None:
            return None
        path = fetched
        # Trainers put the base's config.json beside an adapter; a whole model has weights, too.
        if fetch(source, "config.json", revision) is not None and _has_whole(
            source, revision, path.parent
        ):
            return None
    settings = dict(read_json(path, AdapterFile, constants=True))
    _check_kind(settings, source)
    weights = fetch(source, WEIGHTS, revision)
    if weights is None:
        raise UserError(
            f"target {source}: {WEIGHTS} is missing; an adapter is read from safetensors only. "
            "Load the adapter with peft and save it again (save_pretrained)"
        )
    shapes = {}
    with open_tensors(weights) as file:
        for name in file.keys():  # noqa: SIM118
            if ORIGINAL in name:
                continue
            plain = _WRAPPERS.sub(".", name.removeprefix(_PREFIX))
            shapes[plain] = tuple(file.get_slice(name).get_shape())
    if odd := sorted(name for name in shapes if not _split(name)[1]):
        raise UserError(
            f"{weights}: tensor {odd[0]} belongs to no low-rank adapter that can be read; merge "
            "the adapter into its base (peft: merge_and_unload) and give the merged model"
        )
    return PeftFolder(source, revision, settings, weights, shapes)


def _has_whole(source: str, revision: str | None, snapshot: Path) -> bool:
    """Return whether a hub repository holds the weights of a whole model, without reading them."""
    from huggingface_hub import file_exists
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    try:
        return any(file_exists(source, name, revision=revision) for name in WEIGHT_FILES)
    except (HTTPError, OfflineModeIsEnabled):  # without a connection, what the cache holds
        return any((snapshot / name).is_file() for name in WEIGHT_FILES)


def _check_kind(settings: Mapping[str, Any], source: str) -> None:
    kind = settings.get("peft_type")
    unsupported = [f"peft_type {kind}"] if kind != "LORA" else []
    unsupported += [name for name in _UNSUPPORTED if settings.get(name)]
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and _CHANGES_BASE.search(start):
        unsupported.append(f"init_lora_weights {start}, which changes the base's weights too")
    if unsupported:
        raise UserError(
            f"target {source}: expected a LoRA, rank-stabilised LoRA or DoRA adapter, got "
            f"{', '.join(unsupported)} ({CONFIG}). Merge the adapter into its base (peft: "
            "merge_and_unload) and give the merged model"
        )


def choose_base(folder: PeftFolder, base: str) -> tuple[str, list[str]]:
    """Return the base of a PEFT target (by default the one that the folder names), and notes.

    Two names agree if they are equal, or if one of them is a path: trainers store the path of their
    own machine, and a copy of the base may lie anywhere. If the folder names a quantised base, any
    other one agrees, as the weights before quantisation. Whether the weights fit is checked later.

    Raises:
        UserError: two different hub ids; a base that is quantised by its name; none is named.
    """
    named = folder.base
    if named is not None and is_quantised(named):
        if base and base.casefold() != named.casefold():
            return base, [
                f"the target's {CONFIG} names the base {named}, which is quantised; used is "
                f"pair.base {base}, which should be that model before quantisation"
            ]
        if not Path(named).is_dir():
            raise UserError(
                f"target {folder.source}: its base {named} is quantised ({CONFIG}: "
                "base_model_name_or_path), and only unquantised weights are read. To apply the "
                "adapter to the weights before quantisation, give that model (pair.base)"
            )
    if not base:
        if named is None:
            raise UserError(
                f"pair.base is missing, and {folder.source}/{CONFIG} names none; give the model "
                "that the adapter was trained on (pair.base)"
            )
        if _is_path(named) and not Path(named).is_dir():
            raise UserError(
                f"pair.base is missing, and the base that {folder.source}/{CONFIG} names, "
                f"{named}, is not on this machine; give its folder or hub id (pair.base)"
            )
        return named, []
    if named is None or base in (named, resolve(named)):
        return base, []
    is_folder, is_named_folder = Path(base).is_dir(), Path(named).is_dir()
    if is_folder and is_named_folder and os.path.realpath(base) == os.path.realpath(named):
        return base, []
    if is_folder != is_named_folder or _is_path(base) or _is_path(named):
        return base, [f"the target's {CONFIG} names the base {named}; used is pair.base {base}"]
    if base.casefold() == named.casefold() and not is_folder:
        return base, []
    raise UserError(
        f"pair.base is {base}, but target {folder.source} is an adapter of {named} ({CONFIG}). "
        f"Give that base (pair.base: {named}), or a local folder of the same weights"
    )


def is_quantised(model: str) -> bool:
    """Return whether a model is quantised: by the configuration in its folder, or by its hub id.

    Example:
        >>> is_quantised("unsloth/llama-3-8b-bnb-4bit"), is_quantised("meta-llama/Llama-3.1-8B")
        (True, False)
    """
    if not Path(model).is_dir():
        return _QUANTISED.search(model.split("/")[-1]) is not None
    path = Path(model) / "config.json"
    return path.is_file() and bool(read_json(path, dict[str, Any]).get("quantization_config"))


def _is_path(name: str) -> bool:
    return os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") != 1
