"""Generate responses to one prompt with any model of a run, with features removed or scaled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from fastadapt.data.tokens import check_ids
from fastadapt.effects.requests import RUN
from fastadapt.effects.trace import ADAPTER, COMPARED
from fastadapt.errors import UserError
from fastadapt.evaluation.generation.responses import Request
from fastadapt.evaluation.generation.sampling import SamplingConfig, sample, vocabulary_of
from fastadapt.features.loading import RunContents
from fastadapt.features.store.sets import Pair
from fastadapt.interventions import scale_features

#: Models that can generate, in the order of their distance from the target.
MODELS = (*COMPARED, "target")


@dataclass(frozen=True)
class GenerateConfig:
    """Settings of a generation.

    Args:
        models: models to generate with, among ``MODELS``.
        temperature: temperature of the softmax; 0 takes the most likely token.
        max_new_tokens: largest number of tokens; the context may end a response earlier.
        seed: seed of the random numbers.

    Raises:
        UserError: a setting is impossible.
    """

    models: tuple[str, ...] = (ADAPTER,)
    temperature: float = 0.0
    max_new_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.models or ("none",):
            if name not in MODELS:
                raise UserError(f"--models: expected any of {', '.join(MODELS)}, got {name!r}")
        self.sampling()

    def check_factors(self, factors: Mapping[Pair, float]) -> None:
        """Raise ``UserError`` for factors of features if ``adapter`` does not generate."""
        if factors and ADAPTER not in self.models:
            raise UserError(
                f"--without and --scale change features of the model {ADAPTER}; expected it among "
                f"--models, got {', '.join(self.models)}"
            )

    def sampling(self) -> SamplingConfig:
        """Return the settings of the sampler. A response that repeats itself is not cut."""
        return SamplingConfig(
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            stop_degenerate=False,
            batching="static",
        )


@dataclass(frozen=True)
class Generated:
    """A generated response.

    Attributes:
        model: name of the model.
        tokens: ids of the response, with the end-of-sequence token.
        text: their text, without special tokens.
        finish: ``eos``, or ``length`` if the largest number of tokens or the context ended it.
    """

    model: str
    tokens: list[int]
    text: str
    finish: str


def generate(
    run: RunContents,
    prompt: Sequence[int],
    config: GenerateConfig | None = None,
    factors: Mapping[Pair, float] | None = None,
) -> list[Generated]:
    """Generate a response with each model.

    Args:
        run: the run, see :func:`fastadapt.load`.
        prompt: tokens of the prompt.
        config: settings.
        factors: factor of features of the model ``adapter``, see
            :func:`fastadapt.interventions.scale_features`; 0 removes a feature.

    Raises:
        UserError: the prompt is empty or too long, a feature does not exist, or factors are given
            and ``adapter`` does not generate.
        RunError: a prediction is not finite.
    """
    (responses,) = generate_all(run, [prompt], config, factors)
    return responses


def generate_all(
    run: RunContents,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig | None = None,
    factors: Mapping[Pair, float] | None = None,
) -> list[list[Generated]]:
    """Generate a response to each prompt with each model, see :func:`generate`."""
    config = config or GenerateConfig()
    config.check_factors(factors or {})
    requests = [Request(f"prompt {i}", tuple(prompt)) for i, prompt in enumerate(prompts)]
    by_prompt: list[list[Generated]] = [[] for _ in prompts]
    for name in config.models:
        scaled = scale_features(run.model, factors) if name == ADAPTER and factors else None
        # The features are scaled second: a run's adapters are set when its model is entered.
        with (
            run.models.generating(RUN if name == ADAPTER else name) as model,
            scaled or nullcontext(),
        ):
            for prompt in filter(None, prompts):
                check_ids(prompt, vocabulary_of(model), f"{name}: prompt")
            sampled = sample(model, run.pair.tokenizer, requests, config.sampling())
        for responses, each in zip(by_prompt, sampled.responses, strict=True):
            responses.append(Generated(name, each.tokens, each.text, each.finish))
    return by_prompt
