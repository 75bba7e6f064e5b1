"""Define transformers classes with adapters, for every architecture of ``ARCHITECTURES``.

Each class derives from transformers' own class and wraps the MLPs after construction; no forward is
rewritten. A checkpoint stores the base's MLPs as ``mlp.base`` and the adapters as ``mlp.adapter``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

from torch import nn

from fastadapt.adapter.files import read_settings
from fastadapt.adapter.module import TranscoderAdapter
from fastadapt.errors import UserError
from fastadapt.models.adapted_mlp import AdaptedMLP, Mode, in_mode
from fastadapt.models.architectures import ARCHITECTURES, Paths

PREFIX = "fastadapt_"


class AdaptedModel(nn.Module):
    """Mixin of the registered model classes: wraps the MLPs and switches their mode.

    ``config.adapter`` holds the fields of :class:`AdapterConfig`.
    """

    paths: ClassVar[Paths]
    #: Attribute names that lead from the model to the module that holds the blocks.
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
        """The wrapped MLPs, layer 0 first."""
        return [getattr(block, self.paths.mlp) for block in self._blocks()]

    @contextmanager
    def mode(self, mode: Mode) -> Iterator[AdaptedModel]:
        """Set the mode inside the context: ``hybrid`` (no adapters) or ``replacement``.

        The default mode is ``replacement``. A call that runs in another thread, as
        ``generate_batch`` does, uses the mode if it begins and ends inside the context.

        Raises:
            UserError: the mode does not exist.
        """
        with in_mode(self.adapted_mlps, mode):
            yield self


class AdaptedCausalLM(AdaptedModel):
    """Mixin of the causal language models: ``generate`` also returns features."""

    def generate(
        self,
        inputs: Any = None,
        generation_config: Any = None,
        *args: Any,
        output_features: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Call transformers' ``generate``; with ``output_features``, also return what fired.

        The result then is a dictionary with ``features``: for each returned sequence, a list of
        the codes of each layer, layer 0 first. Each has one entry per active feature: ``tokens``
        (int64 ``[C]``, index into the sequence's row of ``sequences``), ``features`` (int64
        ``[C]``) and ``values`` (the model's dtype, ``[C]``), ordered by token. A feature fires when
        the model reads a token, so the last token of a response, which is drawn but never read,
        has no entries; neither has padding. The tokens are those without the option.

        Greedy search and sampling are supported, with padding, every cache, chunked prefill, and
        without a cache. A forward that transformers would compile (a static cache on a GPU) runs
        without compilation. The option costs one more product of each encoder, and on a GPU a
        synchronization per layer and call. Without it, nothing is added.

        Args:
            inputs: prompts, int64 ``[B, T]``, or ``input_ids`` by name.
            generation_config, args, kwargs: the other arguments of transformers' ``generate``.
            output_features: also return the active features.

        Raises:
            UserError: with ``output_features``: beam search, assisted or paged generation, a cache
                that holds tokens, a logits processor that reads other texts, the mode ``hybrid``,
                ``return_dict_in_generate=False``, or no token ids.
            RunError: with ``output_features``: the calls of the model did not read the returned
                tokens one by one.

        Example::

            import fastadapt.serving
            model = AutoModelForCausalLM.from_pretrained(folder)
            out = model.generate(**prompts, max_new_tokens=20, output_features=True)
            codes = out.features[0][2]           # first sequence, layer 2
            out.sequences[0][codes.tokens]       # the token of each entry
        """
        parent: Any = super()
        if not output_features:
            return parent.generate(inputs, generation_config, *args, **kwargs)
        from fastadapt.models.huggingface.generated_features import generate_with_features

        names = list(inspect.signature(parent.generate).parameters)[2:]
        kwargs |= dict(zip(names, args, strict=False))
        return generate_with_features(self, parent.generate, inputs, generation_config, **kwargs)

    def generate_batch(self, *args: Any, output_features: bool = False, **kwargs: Any) -> Any:
        """Call transformers' ``generate_batch``, which does not return features."""
        if output_features:
            raise UserError(
                "output_features: generate_batch packs the tokens of several prompts, and does not "
                "return features; use generate"
            )
        parent: Any = super()
        return parent.generate_batch(*args, **kwargs)


def model_type_of(architecture: str) -> str:
    """Return the ``model_type`` of exported checkpoints (with adapters) of an architecture."""
    return PREFIX + architecture


@cache
def classes_of(architecture: str) -> tuple[type, type, type]:
    """Return an architecture's classes: configuration, headless model, causal language model."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    paths = ARCHITECTURES[architecture]
    plain = type(AutoConfig.for_model(architecture))
    # Tensor-parallel plans name the MLP's weights, which are now inside ``mlp.base``.
    plan = {
        name.replace(f".{paths.mlp}.", f".{paths.mlp}.base."): style
        for name, style in (plain.base_model_tp_plan or {}).items()
    }
    config = type(
        f"Fastadapt{plain.__name__}",
        (plain,),
        {
            "__module__": __name__,
            "model_type": model_type_of(architecture),
            "base_model_tp_plan": plan,
        },
    )

    def adapted(mixin: type, auto: Any, decoder: tuple[str, ...]) -> type:
        model = auto._model_mapping[plain]
        attributes = {
            "__module__": __name__,
            "config_class": config,
            "paths": paths,
            "decoder": decoder,
            # transformers 5.16 allows SDPA for Gemma 2, but SDPA ignores its soft-capping.
            "_supports_sdpa": paths.attention == "sdpa",
        }
        return type(f"Fastadapt{model.__name__}", (mixin, model), attributes)

    headless = adapted(AdaptedModel, AutoModel, ())
    return config, headless, adapted(AdaptedCausalLM, AutoModelForCausalLM, (paths.decoder,))


def __getattr__(name: str) -> type:
    """Return a class of :func:`classes_of` by its name.

    A pickled configuration names its class. vLLM sends configurations to its worker processes,
    which read them before they load plugins.
    """
    if name.startswith("Fastadapt"):
        kinds = (kind for architecture in ARCHITECTURES for kind in classes_of(architecture))
        for kind in kinds:
            if kind.__name__ == name:
                return kind
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def register() -> None:
    """Register configuration, model and tokenizer classes with transformers' ``Auto`` classes."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    for architecture in ARCHITECTURES:
        config, model, causal = classes_of(architecture)
        AutoConfig.register(model_type_of(architecture), config)
        AutoModel.register(config, model)
        AutoModelForCausalLM.register(config, causal)
        _register_tokenizer(architecture, config)


def _register_tokenizer(architecture: str, config: type) -> None:
    """Register the architecture's tokenizer class for exported checkpoints' ``model_type``.

    transformers chooses the class by ``model_type``, even if the checkpoint names another class.
    """
    from transformers.models.auto import tokenization_auto as auto

    plain, ours = architecture, model_type_of(architecture)
    if (name := auto.TOKENIZER_MAPPING_NAMES.get(plain)) is not None:
        auto.TOKENIZER_MAPPING_NAMES[ours] = name
        auto.AutoTokenizer.register(config, auto.tokenizer_class_from_name(name))
    if plain in auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS:
        auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(ours)
