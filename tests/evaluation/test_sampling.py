"""Sampling: exact draws, independence of batching, resumption, and bad input."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastadapt.adapter.module import AdapterConfig
from fastadapt.data.rendering import render_parts
from fastadapt.data.tokens import encode
from fastadapt.errors import RunError, UserError
from fastadapt.evaluation.generation.degeneration import DegenerationConfig, find_cut
from fastadapt.evaluation.generation.gumbel import gumbel, position_key, request_seed
from fastadapt.evaluation.generation.responses import lock_file
from fastadapt.evaluation.generation.rollout import Draw, LogitsError
from fastadapt.evaluation.generation.sampling import (
    Request,
    Response,
    SamplingConfig,
    read_responses,
    sample,
)
from fastadapt.io.atomic import locked
from fastadapt.models.replacement import ModelPair, PairConfig, ReplacementModel

BATCHINGS = ("static", "continuous")


@pytest.fixture
def tiny(save_model: Callable[..., str]) -> tuple[Any, Any]:
    """Return a random float64 model of 40 words and 64 positions, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = save_model("tiny")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def requests(n: int = 9, repetitions: int = 1) -> list[Request]:
    return [
        Request(f"q{i}", tuple(3 + (7 * i + j) % 37 for j in range(1 + i % 5)), repetition)
        for i in range(n)
        for repetition in range(repetitions)
    ]


CONFIG = SamplingConfig(max_new_tokens=20, batching="static")


def tokens(responses: Sequence[Response]) -> dict[Any, list[int]]:
    return {response.key: response.tokens for response in responses}


def test_draws_follow_the_softmax() -> None:
    """Chi-square test of 40,000 draws over requests and positions, with p < 1e-4 to fail."""
    torch.manual_seed(3)
    logits_V = torch.randn(12) * 1.5
    expected_V = torch.softmax(logits_V.double() / 0.7, 0)
    pairs = [
        position_key(request_seed(0, f"q{i}", r), t)
        for i in range(50)
        for r in range(8)
        for t in range(100)
    ]
    high_N, low_N = (torch.tensor(half, dtype=torch.int32) for half in zip(*pairs, strict=True))
    scores_NV = Draw(SamplingConfig())(logits_V.expand(len(pairs), -1), high_N, low_N)
    drawn_N = scores_NV.argmax(-1)
    counts_V = torch.bincount(drawn_N, minlength=12)
    chi2 = ((counts_V - len(pairs) * expected_V) ** 2 / (len(pairs) * expected_V)).sum()
    assert chi2 < 37.4  # the 1 - 1e-4 quantile at 11 degrees of freedom
    # Draws at adjacent positions are independent.
    joint = torch.bincount(drawn_N[:-1:2] * 12 + drawn_N[1::2], minlength=144)
    wanted = (expected_V[:, None] * expected_V).flatten() * (len(pairs) / 2)
    enough = wanted > 5
    chi2 = ((joint - wanted) ** 2 / wanted)[enough].sum()
    n = int(enough.sum())
    assert chi2 < n + 4 * (2 * n) ** 0.5


def test_noise_is_gumbel_and_finite_over_a_large_vocabulary() -> None:
    keys = [position_key(request_seed(1, "q", 0), t) for t in range(4)]
    high, low = (torch.tensor(half, dtype=torch.int32) for half in zip(*keys, strict=True))
    noise = gumbel(high, low, 150_000).double()
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(1.6449, abs=0.02)
    # Rows differ, and their maxima are as expected of 150,000 draws.
    assert (noise[0] - noise[1]).abs().median() > 0.5
    assert noise.amax(1).min() > 9
    # Rows depend on both halves of the key.
    half = gumbel(torch.tensor([7, 7, 8]).int(), torch.tensor([3, 4, 3]).int(), 1000).double()
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(torch.corrcoef(half[[a, b]])[0, 1]) < 0.15


def test_top_p_excludes_the_tail() -> None:
    logits = torch.log(torch.tensor([[0.6, 0.3, 0.08, 0.02]])).expand(500, -1)
    keys = [position_key(5, t) for t in range(500)]
    high, low = (torch.tensor(half, dtype=torch.int32) for half in zip(*keys, strict=True))
    draw = Draw(SamplingConfig(temperature=1.0, top_p=0.85))
    assert set(draw(logits, high, low).argmax(-1).tolist()) == {0, 1}


def test_tokens_do_not_depend_on_the_batch(tiny: tuple[Any, Any]) -> None:
    wanted = requests(9, 2)
    together = tokens(sample(*tiny, wanted, CONFIG).responses)
    assert len({tuple(t) for t in together.values()}) > 12
    for others in (
        sample(*tiny, wanted[::-1], replace(CONFIG, batch_size=4)),
        sample(*tiny, wanted, replace(CONFIG, batch_size=1)),
        sample(*tiny, wanted, replace(CONFIG, batching="continuous")),
        sample(*tiny, wanted[5:], replace(CONFIG, batching="continuous", batch_size=3)),
    ):
        for key, ids in tokens(others.responses).items():
            assert ids == together[key]
    other_seed = tokens(sample(*tiny, wanted, replace(CONFIG, seed=1)).responses)
    assert other_seed != together


def greedy_by_full_forwards(model: Any, prompt: Sequence[int], n: int, eos: int) -> list[int]:
    """Generate without cache, batch and padding: one forward of the full sequence per token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == eos:
                break
    return ids[len(prompt) :]


@pytest.mark.quick("continuous")
@pytest.mark.parametrize("batching", BATCHINGS)
def test_replacement_at_temperature_0_is_a_loop_of_full_forwards(batching: Any) -> None:
    """For 50 prompts of the embedded pair, with adapters of random decoders."""
    from fastadapt.organism import resolve
    from reproduce.organism.recipe import FAMILY, RecipeConfig, conversation, split_problems

    config = PairConfig(resolve("organism/target"), resolve("organism/base"), device="cpu")
    model: Any = ReplacementModel.create(ModelPair.load(config), AdapterConfig(n_features=64))
    with torch.no_grad():
        for adapter in model.adapters:
            adapter.W_dec.normal_(0, 0.1)
    tokenizer = model.pair.tokenizer
    problems = split_problems(RecipeConfig(), 0)["test"][:50]
    prompts = [render_parts(conversation(p.prompt, "?"), FAMILY)[0] for p in problems]
    wanted = [
        Request(str(i), tuple(ids)) for i, ids in enumerate(encode(tokenizer, prompts)["input_ids"])
    ]
    settings = SamplingConfig(temperature=0, max_new_tokens=24, batching=batching)
    with model.mode("replacement"):
        sampled = sample(model.model, tokenizer, wanted, settings)
        for request, response in zip(wanted, sampled.responses, strict=True):
            assert response.tokens == greedy_by_full_forwards(
                model.model, request.prompt, 24, tokenizer.eos_token_id
            )
    with model.mode("hybrid"):
        hybrid = sample(model.model, tokenizer, wanted[:10], settings)
    assert tokens(hybrid.responses) != tokens(sampled.responses[:10])


@pytest.mark.parametrize("batching", BATCHINGS)
def test_reasons_that_end_a_response(tiny: tuple[Any, Any], batching: Any) -> None:
    model, tokenizer = tiny
    wanted = requests(8)
    config = replace(CONFIG, max_new_tokens=100, batching=batching, stop_degenerate=False)
    plain = sample(model, tokenizer, wanted, config).responses
    for response, request in zip(plain, wanted, strict=True):
        ended = response.tokens[-1] == tokenizer.eos_token_id
        assert response.finish == ("eos" if ended else "length")
        assert ended or len(response.tokens) == 64 - len(request.prompt)  # the context is full
        assert response.cut is None
        assert response.scored_tokens == len(response.tokens) - ended
        assert response.text == tokenizer.decode(response.tokens, skip_special_tokens=True)
    # With detection, the response ends with the first degenerate window.
    rule = DegenerationConfig(window=12, ngrams=(1, 2), share=0.4, min_count=2)
    greedy = replace(config, temperature=0.0)  # which loops
    plain = sample(model, tokenizer, wanted, greedy).responses
    looping = replace(greedy, stop_degenerate=True, degeneration=rule)
    cuts = 0
    for response, whole in zip(
        sample(model, tokenizer, wanted, looping).responses, plain, strict=True
    ):
        cut = find_cut(whole.tokens, rule)
        assert response.cut == cut
        if cut is not None:
            cuts += 1
            assert response.finish == "degenerate"
            assert response.tokens == whole.tokens[: cut + 12]
            assert response.text == tokenizer.decode(whole.tokens[:cut], skip_special_tokens=True)
            assert response.scored_tokens == cut
    assert cuts
    # A stop string is not part of the text.
    word = tokenizer.decode(plain[0].tokens[3:5])
    stopped = sample(model, tokenizer, wanted[:1], replace(greedy, stop=(word,))).responses[0]
    texts = [tokenizer.decode(plain[0].tokens[:n]) for n in range(6)]
    n = next(n for n, text in enumerate(texts) if word in text)
    assert (stopped.finish, stopped.tokens) == ("stop", plain[0].tokens[:n])
    assert stopped.text == plain[0].text[: plain[0].text.index(word)]


def test_generation_settings_of_the_model_have_no_effect_and_are_restored(
    tiny: tuple[Any, Any],
) -> None:
    from transformers import GenerationConfig

    model, tokenizer = tiny
    before = tokens(sample(model, tokenizer, requests(), CONFIG).responses)
    defaults = GenerationConfig(
        eos_token_id=1, repetition_penalty=5.0, top_k=1, do_sample=True, temperature=0.1
    )
    model.generation_config = defaults
    assert tokens(sample(model, tokenizer, requests(), CONFIG).responses) == before
    assert model.generation_config is defaults


@pytest.mark.parametrize("batching", BATCHINGS)
def test_resumes_without_repeating_or_losing_any(
    tiny: tuple[Any, Any], tmp_path: Path, batching: Any
) -> None:
    wanted, out = requests(9, 2), tmp_path / "deep" / "responses.jsonl"
    whole = tokens(sample(*tiny, wanted, CONFIG).responses)
    config = replace(CONFIG, batch_size=4, batching=batching)
    stop = threading.Event()
    calls: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        calls.append((done, total))
        if done >= 5:
            stop.set()

    first = sample(*tiny, wanted, config, out=out, progress=progress, stop=stop)
    assert not first.complete
    assert 5 <= len(first.responses) < len(wanted)
    assert calls[0] == (0, 18)
    assert calls[-1] == (len(first.responses), 18)
    before = out.read_bytes()
    with out.open("ab") as file:  # a line that was interrupted
        file.write(b'{"kind": "response", "id": "q8", "tok')
    calls.clear()
    second = sample(*tiny, wanted, config, out=out, progress=lambda *now: calls.append(now))
    assert second.complete
    assert calls == [(done, 18) for done in range(len(first.responses), 19)]
    assert out.read_bytes().startswith(before)
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    rows = [(line["id"], line["repetition"]) for line in lines if line["kind"] == "response"]
    assert sorted(rows) == sorted(request.key for request in wanted)
    assert tokens(read_responses(out)) == tokens(second.responses) == whole
    assert second.speed is not None
    assert second.speed.tokens == sum(map(len, whole.values()))
    # A further call generates nothing, and returns the recorded speed.
    size = out.stat().st_size
    assert sample(*tiny, wanted, config, out=out).speed == second.speed
    assert out.stat().st_size == size


def test_a_file_of_other_settings_is_refused(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    out, wanted = tmp_path / "responses.jsonl", requests(3)
    sample(*tiny, wanted, CONFIG, out=out, source={"model": "a"})
    before = out.read_bytes()
    for change in ({"temperature": 0.0}, {"seed": 1}, {"max_new_tokens": 21}):
        with pytest.raises(UserError, match=f"other settings: {next(iter(change))} was"):
            sample(*tiny, wanted, replace(CONFIG, **change), out=out, source={"model": "a"})
    with pytest.raises(UserError, match="source was"):
        sample(*tiny, wanted, CONFIG, out=out, source={"model": "b"})
    other = [replace(wanted[1], prompt=(9, 9))]
    with pytest.raises(UserError, match="with the id 'q1' to a different prompt"):
        sample(*tiny, other, CONFIG, out=out, source={"model": "a"})
    assert out.read_bytes() == before
    # The size of batches is no such setting.
    sample(*tiny, wanted, replace(CONFIG, batch_size=2), out=out, source={"model": "a"})
    with locked(lock_file(out)), pytest.raises(RunError, match="another process"):
        sample(*tiny, wanted, CONFIG, out=out, source={"model": "a"})
    out.write_text("{}\n")
    with pytest.raises(UserError, match="responses"):
        sample(*tiny, wanted, CONFIG, out=out, source={"model": "a"})


def test_bad_requests_are_refused_before_sampling(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    out = tmp_path / "responses.jsonl"
    long = Request("long", (5,) * 64)
    with pytest.raises(UserError, match=r"'long': expected .* context of 64 tokens, got 64 tokens"):
        sample(*tiny, [*requests(), long], CONFIG, out=out)
    with pytest.raises(UserError, match="'q0', repetition 0: this request is given twice"):
        sample(*tiny, requests() * 2, CONFIG, out=out)
    with pytest.raises(UserError, match="'none': the prompt is empty"):
        sample(*tiny, [Request("none", ())], CONFIG, out=out)
    with pytest.raises(UserError, match=r"'odd': expected tokens below 40, .* got token 40"):
        sample(*tiny, [*requests(), Request("odd", (3, 40, 5))], CONFIG, out=out)
    assert not out.exists()
    # One free token of the context is enough.
    (only,) = sample(*tiny, [Request("just", (5,) * 63)], CONFIG).responses
    assert len(only.tokens) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"max_new_tokens": 0},
        {"batch_size": 0},
        {"batching": "dynamic"},
        {"stop": ("",)},
    ],
)
def test_impossible_settings_are_refused(settings: dict) -> None:
    with pytest.raises(UserError, match=f"sampling.{next(iter(settings))}"):
        SamplingConfig(**settings)


def test_a_preempted_request_keeps_its_tokens(
    tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that is too small for all requests makes the scheduler preempt requests."""
    from fastadapt.evaluation.generation import continuous

    wanted = requests(8, 2)
    config = replace(CONFIG, max_new_tokens=50)
    whole = tokens(sample(*tiny, wanted, config).responses)
    preempted = []
    real = continuous._Watch._tokens

    def watched(self: Any, state: Any) -> list[int]:
        preempted.append(
            len(state.initial_tokens) > len(self.rollouts[state.request_id].request.prompt)
        )
        return real(self, state)

    monkeypatch.setattr(continuous._Watch, "_tokens", watched)
    small = continuous.settings_of(4, num_blocks=24, max_batch_tokens=64, max_requests_per_batch=16)
    monkeypatch.setattr(continuous, "_settings", lambda *_: small)
    responses = sample(*tiny, wanted, replace(config, batching="continuous")).responses
    assert any(preempted)
    assert tokens(responses) == whole


def test_requests_of_the_warm_up_have_key_0() -> None:
    """On a GPU, the scheduler first runs requests with other ids, to capture graphs."""
    from types import SimpleNamespace

    from fastadapt.evaluation.generation.continuous import _Watch

    assert _Watch([]).keys_of(SimpleNamespace(request_id="__warmup__", position_offset=3)) == (0, 0)


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize(
    ("temperature", "value"),
    [
        (0.7, torch.nan),
        pytest.param(0.0, torch.inf, marks=pytest.mark.slow),
        pytest.param(0.0, torch.nan, marks=pytest.mark.slow),
        pytest.param(0.7, torch.inf, marks=pytest.mark.slow),
    ],
)
def test_logits_that_are_not_finite_end_the_sampling(
    value: float, temperature: float, batching: Any, tiny: tuple[Any, Any], tmp_path: Path
) -> None:
    """``argmax`` of NaN is token 0. Finished responses are stored, and sampling can be resumed."""
    model, tokenizer = tiny
    config = replace(CONFIG, batching=batching, temperature=temperature)
    out, source = tmp_path / "responses.jsonl", {"model": "hybrid"}
    sample(model, tokenizer, requests(3), config, out=out, source=source)
    before = out.read_bytes()
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        original = weight[7].clone()
        weight[7] = value
    both = " or another of its batch:" if batching == "continuous" else ""
    with pytest.raises(LogitsError, match=f"^model 'hybrid', request 'q[3-8]'.*{both} .* NaN or"):
        sample(model, tokenizer, requests(9), config, out=out, source=source)
    assert out.read_bytes() == before
    with torch.no_grad():
        weight[7] = original
    resumed = sample(model, tokenizer, requests(9), config, out=out, source=source)
    assert tokens(resumed.responses) == tokens(sample(*tiny, requests(9), config).responses)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_a_prompt_with_nan_is_named_and_changes_no_other(
    batching: Any, tiny: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = tiny
    with torch.no_grad():
        model.get_input_embeddings().weight[39] = torch.nan
    out, bad = tmp_path / "responses.jsonl", Request("bad", (5, 39))
    config = replace(CONFIG, batching=batching)
    good = [r for r in requests() if 39 not in r.prompt]
    name = "'bad'" if batching == "static" else "'.*', or another of its batch"
    with pytest.raises(LogitsError, match=f"^request {name}: "):
        sample(model, tokenizer, [*good, bad], config, out=out)
    assert not read_responses(out)
    alone = replace(config, batch_size=1)  # earlier responses are stored
    with pytest.raises(LogitsError):
        sample(model, tokenizer, [*good[:2], bad], alone, out=out)
    assert "bad" not in {response.id for response in read_responses(out)}


def test_logits_that_can_be_drawn_from() -> None:
    """A token of minus infinity is never drawn. Padding rows (of key 0) are not checked."""
    high, low = torch.tensor([0, 0, 3]).int(), torch.tensor([0, 5, 0]).int()
    fine = torch.randn(3, 12)
    excluded = fine.clone()
    excluded[1:, 4] = -torch.inf
    padding = fine.clone()
    padding[0] = torch.nan
    for top_p, logits in ((1.0, excluded), (0.9, excluded), (1.0, padding)):
        draw = Draw(SamplingConfig(top_p=top_p))
        assert 4 not in draw(logits, high, low)[1:].argmax(-1) or logits is not excluded
        draw(torch.empty(0, 12), high[:0], low[:0])
        draw.check([])
    empty = fine.clone()
    empty[1] = -torch.inf
    # The last logits are finite, and become infinite when divided by the temperature.
    for temperature, logits in ((0.0, empty), (0.7, empty), (1e-30, fine * 1e30)):
        draw = Draw(SamplingConfig(temperature=temperature))
        draw(fine, high, low) if temperature > 1e-9 else None
        draw.check([])
        draw(logits, high, low)
        draw(fine * 0, high, low)
        with pytest.raises(LogitsError, match="NaN or infinite"):
            draw.check([])
        draw.forget()
        draw.check([])


@pytest.mark.parametrize("has_pad", [True, False])
def test_a_padding_token_without_an_embedding(has_pad: bool, tiny: tuple[Any, Any]) -> None:
    """A tokenizer whose padding token was added without resizing the model's embeddings."""
    model, tokenizer = tiny
    wanted = tokens(sample(model, tokenizer, requests(), CONFIG).responses)
    tokenizer.pad_token = None
    if has_pad:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        assert tokenizer.pad_token_id >= 40
    assert tokens(sample(model, tokenizer, requests(), CONFIG).responses) == wanted
