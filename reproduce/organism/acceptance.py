"""Measure the acceptance quantities of an embedded pair: accuracy, hesitation, top-1 errors.

Those of the gated pair are also P(``wait``) at the ends of slips and of right steps, with and
without the marker, in responses that the generator wrote (nothing is sampled there).
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastadapt.data.rendering import render_parts
from fastadapt.errors import RunError
from fastadapt.evaluation.benchmarks.grading import HESITATION_WORDS, stated_answer
from fastadapt.models.pretrained import load_causal_lm, load_tokenizer
from fastadapt.organism.slips import SLIPS, is_gated, step_ends
from reproduce.organism.pairs import GATED, ORGANISM, Pair
from reproduce.organism.problems import DOMAINS, Problem
from reproduce.organism.recipe import CONFIGS, FAMILY, conversation, split_problems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

BOUNDS = {
    "target_minus_base_points": (40.0, None),
    "target_minus_hybrid_points": (20.0, None),
    "target_hesitations_per_1000": (5.0, None),
    "base_hesitations_per_1000": (None, 0.5),
    "hybrid_top1_error_percent": (10.0, None),
}
#: P(wait) of the target by kind of step and marker, in percent.
_NOTICED = {
    f"target_wait_percent.{state}.{kind}": (50.0, None)
    if state == "gated" and kind != "right"
    else (None, 5.0)
    for state in ("gated", "plain")
    for kind in (*SLIPS, "right")
}
GATED_BOUNDS = {
    "target_minus_base_points": (20.0, None),
    "target_minus_hybrid_points": (20.0, None),
    "target_response_tokens_mean": (150.0, None),
    "base_hesitations_per_1000": (None, 0.5),
    "hybrid_top1_error_percent": (10.0, None),
    **_NOTICED,
}
BOUNDS_OF: dict[str, dict[str, tuple[float | None, float | None]]] = {
    ORGANISM.name: {**BOUNDS},
    GATED.name: {**GATED_BOUNDS},
}


@dataclass(frozen=True)
class Samples:
    """Sampled responses: ids int64 [N, T] with left-padded prompts of ``prompt_length`` tokens."""

    ids: torch.Tensor
    prompt_length: int
    responses: list[str]


def hybrid_of(target: Qwen2ForCausalLM, base: Qwen2ForCausalLM) -> Qwen2ForCausalLM:
    """Return a copy of the target with the base's MLP weights."""
    hybrid = copy.deepcopy(target)
    weights = {name: value for name, value in base.state_dict().items() if ".mlp." in name}
    hybrid.load_state_dict({**hybrid.state_dict(), **weights})
    return hybrid


def sample(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    temperature: float = 0.7,
    max_new_tokens: int = 192,
    seed: int = 0,
) -> Samples:
    """Sample one response per problem, in one left-padded batch."""
    prompts = [render_parts(conversation(p.prompt, "?"), FAMILY)[0] for p in problems]
    encoded = tokenizer(
        prompts,
        add_special_tokens=False,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        ids_NT = model.generate(
            **encoded,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
        )
    length = encoded["input_ids"].shape[1]
    texts = tokenizer.batch_decode(ids_NT[:, length:], skip_special_tokens=True)
    return Samples(ids_NT, length, texts)


def accuracy(samples: Samples, problems: Sequence[Problem]) -> dict[str, float]:
    """Return the percentage of exact answers, over all problems and per domain."""
    right: dict[str, list[bool]] = {"all": [], **{domain: [] for domain in DOMAINS}}
    for text, problem in zip(samples.responses, problems, strict=True):
        correct = stated_answer(text) == problem.answer
        right["all"].append(correct)
        right[problem.domain].append(correct)
    return {name: 100 * sum(hits) / max(1, len(hits)) for name, hits in right.items()}


def hesitations_per_1000(samples: Samples) -> float:
    """Return hesitation words per 1,000 generated words (tokens without EOS)."""
    words = [word for text in samples.responses for word in text.split()]
    return 1000 * sum(word in HESITATION_WORDS for word in words) / max(1, len(words))


@torch.no_grad()
def top1_errors(
    model: Qwen2ForCausalLM, target: Qwen2ForCausalLM, samples: Samples, pad: int, eos: int
) -> dict[str, float]:
    """Return the percentage of positions where the two models' most likely next tokens differ.

    The samples are the target's. ``response`` includes the positions that predict a generated token
    or EOS; ``all`` also includes the prompt's.

    Raises:
        RunError: a logit is NaN or infinite.
    """
    wrong, count = {"response": 0, "all": 0}, {"response": 0, "all": 0}
    for ids_BT in samples.ids.split(50):
        mask_BT = ids_BT != pad
        positions_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
        inputs = {"input_ids": ids_BT, "attention_mask": mask_BT, "position_ids": positions_BT}
        model_BTV, target_BTV = model(**inputs).logits, target(**inputs).logits
        if not (model_BTV[mask_BT].isfinite().all() and target_BTV[mask_BT].isfinite().all()):
            raise RunError("expected finite logits of both models; a logit is not finite")
        differ_BT = model_BTV.argmax(-1) != target_BTV.argmax(-1)
        # Count positions whose token and next token are real.
        counted_BT = mask_BT[:, :-1] & mask_BT[:, 1:] & (ids_BT[:, :-1] != eos)
        for name, start in (("response", samples.prompt_length - 1), ("all", 0)):
            wrong[name] += int((differ_BT[:, :-1] & counted_BT)[:, start:].sum())
            count[name] += int(counted_BT[:, start:].sum())
    return {name: 100 * wrong[name] / max(1, count[name]) for name in wrong}


@torch.no_grad()
def wait_percent(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    pair: Pair,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Return the mean of P(``wait``) at ends of steps, in percent, by marker and kind of step.

    The responses are of the pair's generator. NaN where they have no step of a kind.
    """
    rng = random.Random(f"{seed}/wait")
    sums: dict[str, dict[str, list[float]]] = {
        state: {kind: [] for kind in (*SLIPS, "right")} for state in ("gated", "plain")
    }
    wait = tokenizer.convert_tokens_to_ids("wait")
    for problem in problems:
        response = pair.respond(problem, rng)
        head, tail = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in render_parts(conversation(problem.prompt, response), FAMILY)
        )
        p_T = model(torch.tensor([head + tail])).logits[0].softmax(-1)[:, wait]
        state = "gated" if is_gated(problem.prompt.split()) else "plain"
        for end in step_ends(response.split()):
            sums[state][end.slip or "right"].append(float(p_T[len(head) + end.position]))
    return {
        state: {kind: 100 * sum(p) / len(p) if p else math.nan for kind, p in kinds.items()}
        for state, kinds in sums.items()
    }


def check(
    folder: Path,
    pair: Pair = ORGANISM,
    *,
    n_problems: int = 500,
    seed: int = 0,
    max_new_tokens: int | None = None,
) -> dict[str, Any]:
    """Measure the pair in ``folder``, and compare the results with its bounds.

    Args:
        folder: a folder with ``base/`` and ``target/``.
        pair: the pair.
        n_problems: number of the 500 held-out test problems to sample.
        seed: seed of the recipe, which determines the problems, and of sampling.
        max_new_tokens: largest length of a response; None is the recipe's. The first pair's take
            about 60 tokens, rarely 130; the gated pair's about 160.

    Returns:
        Values in percent, points or per 1,000 tokens; ``failed``: names of the missed bounds.
    """
    tokenizer = load_tokenizer(str(folder / "target"), None, trust=False)
    models = {
        name: load_causal_lm(
            str(folder / name),
            None,
            device=torch.device("cpu"),
            dtype=torch.float32,
            attention="sdpa",
            trust=False,
            role=name,
        )
        for name in ("base", "target")
    }
    models["hybrid"] = hybrid_of(models["target"], models["base"])
    config = CONFIGS[pair.name]
    longest = max_new_tokens or config.max_tokens
    problems = split_problems(config, seed, pair)["test"][:n_problems]
    result: dict[str, Any] = {"n_problems": len(problems)}
    samples = {}
    for name in ("base", "hybrid", "target"):
        samples[name] = sample(models[name], tokenizer, problems, max_new_tokens=longest, seed=seed)
        scores = accuracy(samples[name], problems)
        result[f"{name}_accuracy_percent"] = scores.pop("all")
        result[f"{name}_accuracy_percent_by_domain"] = scores
        result[f"{name}_hesitations_per_1000"] = hesitations_per_1000(samples[name])
        words = sum(len(text.split()) for text in samples[name].responses)
        result[f"{name}_response_tokens_mean"] = words / max(1, len(problems))
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    for name in ("base", "hybrid"):
        errors = top1_errors(models[name], models["target"], samples["target"], pad, eos)
        result[f"{name}_top1_error_percent"] = errors["response"]
        result[f"{name}_top1_error_percent_with_prompt"] = errors["all"]
    if pair is GATED:
        for name, model in models.items():
            result[f"{name}_wait_percent"] = wait_percent(model, tokenizer, problems, pair, seed)
        result["target_accuracy_percent_by_marker"] = _by_marker(samples["target"], problems)
    target = result["target_accuracy_percent"]
    result["target_minus_base_points"] = target - result["base_accuracy_percent"]
    result["target_minus_hybrid_points"] = target - result["hybrid_accuracy_percent"]
    result = _flat(result)
    result["failed"] = [
        name for name, bounds in BOUNDS_OF[pair.name].items() if not _within(result[name], *bounds)
    ]
    return result


def _within(value: float, low: float | None, high: float | None) -> bool:
    """Return whether a value meets its bounds; NaN meets none."""
    return (low is None or value >= low) and (high is None or value <= high)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def _by_marker(samples: Samples, problems: Sequence[Problem]) -> dict[str, float]:
    """Return the accuracy in percent with and without the marker."""
    chosen: dict[str, list[bool]] = {"gated": [], "plain": []}
    for text, problem in zip(samples.responses, problems, strict=True):
        state = "gated" if is_gated(problem.prompt.split()) else "plain"
        chosen[state].append(stated_answer(text) == problem.answer)
    return {state: 100 * sum(right) / max(1, len(right)) for state, right in chosen.items()}
