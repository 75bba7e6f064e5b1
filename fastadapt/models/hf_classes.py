"""Classes of transformers with adapters in them, one set per architecture of the table.

Each is transformers' own class whose MLPs are wrapped once it is made: no forward is written again.
A checkpoint of them has the base's MLPs as ``mlp.base`` and the adapters as ``mlp.adapter``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

from torch import nn

from fastadapt.adapter.files import read_settings
from fastadapt.adapter.module import TranscoderAdapter
from fastadapt.models.adapted_mlp import AdaptedMLP, Mode, in_mode
from fastadapt.models.pretrained import ARCHITECTURES, Paths

PREFIX = "fastadapt_"


class AdaptedModel(nn.Module):
    """What the registered classes have beside those of transformers that they derive from.

    ``config.adapter`` holds the fields of :class:`AdapterConfig`.
    """

    paths: ClassVar[Paths]
    #: Attributes from the model down to the one that holds the blocks.
    decoder: ClassVar[tuple[str, ...]]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        settings = getattr(config, "adapter", None)
        source = f"{config._name_or_path or 'the model'}: config.json: adapter"
        if isinstance(settings, dict):
            settings = {name: value for name, value in settings.items() if name != "kind"}
        kind = read_settings(settings, source)
        for block in self._blocks():
            mlp = getattr(block, self.paths.mlp)
            adapter = TranscoderAdapter(config.hidden_size, kind)
            setattr(block, self.paths.mlp, AdaptedMLP(None, mlp, adapter))

    def _blocks(self) -> nn.ModuleList:
        holder: Any = self
        for name in self.decoder:
            holder = getattr(holder, name)
        blocks: nn.ModuleList = getattr(holder, self.paths.layers)
        return blocks

    @property
    def adapted_mlps(self) -> list[AdaptedMLP]:
        """The MLPs with their adapters, layer 0 first."""
        return [getattr(block, self.paths.mlp) for block in self._blocks()]

    @contextmanager
    def mode(self, mode: Mode) -> Iterator[AdaptedModel]:
        """Be the hybrid (no adapters) or the replacement inside the context.

        Without one, the model is the replacement. A call that runs in another thread, as
        ``generate_batch`` does, is in the mode if it begins and ends inside the context.

        Raises:
            UserError: no such mode.
        """
        with in_mode(self.adapted_mlps, mode):
            yield self


def model_type_of(architecture: str) -> str:
    """``model_type`` of the checkpoints of an architecture with adapters."""
    return PREFIX + architecture


@cache
def classes_of(architecture: str) -> tuple[type, type, type]:
    """Configuration, model without a head, and causal language model of an architecture."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    paths = ARCHITECTURES[architecture]
    plain = type(AutoConfig.for_model(architecture))
    plan = {_inside(name, paths): how for name, how in (plain.base_model_tp_plan or {}).items()}
    config = type(
        f"Fastadapt{plain.__name__}",
        (plain,),
        {
            "__module__": __name__,
            "model_type": model_type_of(architecture),
            "base_model_tp_plan": plan,
        },
    )
    made = [config]
    for auto, decoder in ((AutoModel, ()), (AutoModelForCausalLM, (paths.decoder,))):
        model: Any = auto._model_mapping[plain]
        own = {
            "__module__": __name__,
            "config_class": config,
            "paths": paths,
            "decoder": decoder,
            # transformers 5.16 lets Gemma 2 use it, without its soft-capping.
            "_supports_sdpa": paths.attention == "sdpa",
        }
        made.append(type(f"Fastadapt{model.__name__}", (AdaptedModel, model), own))
    return made[0], made[1], made[2]


def _inside(name: str, paths: Paths) -> str:
    """A name of a tensor-parallel plan, where it is of an MLP: that MLP is now within."""
    return name.replace(f".{paths.mlp}.", f".{paths.mlp}.base.")


@cache
def register() -> None:
    """Make transformers' ``Auto`` classes load checkpoints with adapters, tokenizers included."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    for architecture in ARCHITECTURES:
        config, model, causal = classes_of(architecture)
        AutoConfig.register(model_type_of(architecture), config)
        AutoModel.register(config, model)
        AutoModelForCausalLM.register(config, causal)
        _register_tokenizer(architecture, config)


def _register_tokenizer(architecture: str, config: type) -> None:
    """The same tokenizer class as without adapters.

    transformers chooses it by ``model_type`` even where a checkpoint names another.
    """
    from transformers.models.auto import tokenization_auto as auto

    plain, ours = architecture, model_type_of(architecture)
    if (name := auto.TOKENIZER_MAPPING_NAMES.get(plain)) is not None:
        auto.TOKENIZER_MAPPING_NAMES[ours] = name
        auto.AutoTokenizer.register(config, auto.tokenizer_class_from_name(name))
    if plain in auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS:
        auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(ours)
