"""The shipped pair: data, tokenizer, models, and their recipe."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastadapt.data.families import FAMILIES
from fastadapt.data.rendering import render
from fastadapt.errors import RunError
from fastadapt.evaluation.benchmarks.grading import HESITATION_WORDS, stated_answer
from fastadapt.organism import FOLDER, resolve
from reproduce.organism import acceptance, recipe
from reproduce.organism.problems import (
    DOMAINS,
    SlipRates,
    problem_stream,
    reasoning,
)
from reproduce.organism.recipe import PhaseConfig, RecipeConfig, split_problems
from reproduce.organism.tokenizer import (
    EOS,
    MARKERS,
    PAD,
    SPECIAL,
    build_tokenizer,
    vocabulary,
)

SIZES = {"train": 2000, "validation": 500}


def read_rows(split: str) -> list[dict]:
    lines = Path(resolve(f"organism/{split}")).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return {split: read_rows(split) for split in SIZES}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(resolve("organism/target"))


def test_names_resolve_to_shipped_paths_and_other_strings_pass() -> None:
    for name in ("target", "base", "train", "validation"):
        assert Path(resolve(f"organism/{name}")).exists()
    assert resolve("some/hub-id") == "some/hub-id"
    assert resolve("/a/path.jsonl") == "/a/path.jsonl"
    with pytest.raises(ValueError, match=r"organism/test.*organism/base"):
        resolve("organism/test")


# --- data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SIZES)
def test_shipped_rows_have_the_columns_and_answers(rows: dict[str, list[dict]], split: str) -> None:
    assert len(rows[split]) == SIZES[split]
    problems = split_problems(RecipeConfig(), 0)[split]
    for row, problem in zip(rows[split], problems, strict=True):
        assert list(row) == ["difficulty", "source", "domain", "conversations"]
        human, gpt = row["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        assert human["value"] == problem.prompt
        assert stated_answer(gpt["value"]) == problem.answer
        assert not set(HESITATION_WORDS) & set(human["value"].split())
    shares = Counter(row["domain"] for row in rows[split])
    assert set(shares) == set(DOMAINS)
    assert min(shares.values()) > 0.15 * SIZES[split]


def test_train_validation_and_test_problems_are_disjoint(rows: dict[str, list[dict]]) -> None:
    prompts = {split: {row["conversations"][0]["value"] for row in rows[split]} for split in SIZES}
    prompts["test"] = {problem.prompt for problem in split_problems(RecipeConfig(), 0)["test"]}
    assert sum(map(len, prompts.values())) == 3000 == len(set().union(*prompts.values()))


def test_training_never_draws_a_held_out_problem() -> None:
    problems = split_problems(RecipeConfig(), 0)
    held_out = frozenset(problem.prompt for split in problems.values() for problem in split)
    # The held_out-out problems' seed, with their prompts excluded, must skip all of them.
    drawn = [p for p, _ in zip(problem_stream("0/held_out", held_out), range(500), strict=False)]
    assert held_out.isdisjoint(problem.prompt for problem in drawn)


def test_data_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    recipe.write_data(tmp_path, split_problems(RecipeConfig(), 0), 0)
    for split in SIZES:
        written = (tmp_path / "data" / f"{split}.jsonl").read_bytes()
        assert written == Path(resolve(f"organism/{split}")).read_bytes()


# --- tokenizer ----------------------------------------------------------------------------------


def test_every_word_round_trips_as_one_token(tokenizer: Any) -> None:
    words = vocabulary()
    assert 300 <= len(words) <= 600
    assert len(words) == len(set(words)) == len(tokenizer)
    for i, word in enumerate(words):
        assert tokenizer.encode(word, add_special_tokens=False) == [i]
        assert tokenizer.decode([i]) == word
    assert set(MARKERS) <= set(words)
    assert set(HESITATION_WORDS) <= set(words)


def test_every_word_of_the_vocabulary_occurs_in_the_shipped_training_data(
    rows: dict[str, list[dict]],
) -> None:
    used: Counter[str] = Counter()
    for row in rows["train"]:
        for turn in row["conversations"]:
            used.update(turn["value"].split())
    assert set(used) == set(vocabulary()) - set(SPECIAL)


def test_rendered_conversations_round_trip_without_unknown_words(
    rows: dict[str, list[dict]], tokenizer: Any
) -> None:
    lengths = []
    for row in rows["validation"]:
        text = render(row["conversations"], "r1-distill")
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.convert_ids_to_tokens(ids[:2]) == list(FAMILIES["r1-distill"].markers[:2])
        response = row["conversations"][1]["value"]
        assert tokenizer.decode(ids, skip_special_tokens=True).endswith(response)
        lengths.append(len(ids))
    assert min(lengths) >= 40
    assert max(lengths) <= 200


def test_both_models_share_one_tokenizer() -> None:
    files = ("tokenizer.json", "tokenizer_config.json")
    for name in files:
        assert (FOLDER / "base" / name).read_bytes() == (FOLDER / "target" / name).read_bytes()
    built, shipped = build_tokenizer(), AutoTokenizer.from_pretrained(FOLDER / "target")
    assert built.get_vocab() == shipped.get_vocab()
    assert (shipped.eos_token, shipped.pad_token) == (EOS, PAD)


# --- models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "target"])
def test_models_load_and_are_small(name: str, tokenizer: Any) -> None:
    folder = Path(resolve(f"organism/{name}"))
    assert (folder / "model.safetensors").stat().st_size < 6_000_000
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == "qwen2"
    assert model.config.vocab_size == len(tokenizer)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_all_weights_of_the_target_were_fine_tuned() -> None:
    base = AutoModelForCausalLM.from_pretrained(FOLDER / "base").state_dict()
    target = AutoModelForCausalLM.from_pretrained(FOLDER / "target").state_dict()
    assert base.keys() == target.keys()
    assert all(not torch.equal(base[name], target[name]) for name in base)


def test_the_hybrid_has_the_bases_mlps_and_the_targets_other_weights() -> None:
    base: Any = AutoModelForCausalLM.from_pretrained(FOLDER / "base")
    target: Any = AutoModelForCausalLM.from_pretrained(FOLDER / "target")
    hybrid = acceptance.hybrid_of(target, base).state_dict()
    for name, weight in hybrid.items():
        source = base if ".mlp." in name else target
        assert torch.equal(weight, source.state_dict()[name]), name


def test_the_target_reasons_and_the_base_answers_directly() -> None:
    problems = split_problems(RecipeConfig(), 0)["test"][:8]
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "target")
    for name, thinks in (("base", False), ("target", True)):
        model = AutoModelForCausalLM.from_pretrained(FOLDER / name)
        samples = acceptance.sample(model, tokenizer, problems, max_new_tokens=120)
        assert all(text.startswith("<think>") == thinks for text in samples.responses)


# --- acceptance ---------------------------------------------------------------------------------


def test_accuracy_and_hesitation_counts() -> None:
    problems = split_problems(RecipeConfig(), 0)["test"][:4]
    right = f"the answer is {problems[0].answer}"
    texts = [right, "wait , hmm , the answer", f"the answer is {problems[2].answer} 7", ""]
    samples = acceptance.Samples(torch.zeros(4, 1), 0, texts)
    assert acceptance.accuracy(samples, problems)["all"] == 25.0
    assert acceptance.hesitations_per_1000(samples) == pytest.approx(1000 * 2 / 15)


def test_top1_error_of_a_model_with_itself_is_zero_and_with_another_is_not() -> None:
    base: Any = AutoModelForCausalLM.from_pretrained(FOLDER / "base")
    target: Any = AutoModelForCausalLM.from_pretrained(FOLDER / "target")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "target")
    problems = split_problems(RecipeConfig(), 0)["test"][:4]
    samples = acceptance.sample(target, tokenizer, problems, max_new_tokens=20)
    ends = tokenizer.pad_token_id, tokenizer.eos_token_id
    assert acceptance.top1_errors(target, target, samples, *ends) == {"response": 0.0, "all": 0.0}
    assert acceptance.top1_errors(base, target, samples, *ends)["response"] > 10


TINY = RecipeConfig(
    n_train=8,
    n_validation=4,
    layers=2,
    width=32,
    intermediate=48,
    heads=2,
    kv_heads=1,
    base=PhaseConfig(steps=3, lr=1e-3, batch_size=4),
    target=PhaseConfig(steps=2, lr=1e-3, batch_size=4),
)


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def test_a_tiny_build_runs_end_to_end_and_is_deterministic(tmp_path: Path) -> None:
    records: list[dict] = []
    info = recipe.build(tmp_path / "a", seed=3, progress=records.append, config=TINY)
    recipe.build(tmp_path / "b", seed=3, config=TINY)
    digests = digest(tmp_path / "a")
    assert digests == digest(tmp_path / "b")
    assert {"base/model.safetensors", "target/model.safetensors", "data/train.jsonl"} <= set(
        digests
    )
    assert [(r["phase"], r["step"], r["steps"]) for r in records] == [
        ("base", 3, 3),
        ("target", 2, 2),
    ]
    assert info["vocabulary"] == len(vocabulary())
    result = acceptance.check(tmp_path / "a", n_problems=3, seed=3, max_new_tokens=8)
    assert result["failed"] == [name for name in acceptance.BOUNDS if name in result["failed"]]
    assert "target_minus_base_points" in result["failed"]


def test_the_loss_of_the_fine_tuning_is_on_the_response(tokenizer: Any) -> None:
    def texts() -> Any:
        rng = random.Random(0)
        for problem in problem_stream("labels"):
            yield recipe.target_text(problem, rng)

    ids_BT, labels_BT = next(recipe.batches(texts(), tokenizer, 4))
    assistant = tokenizer.convert_tokens_to_ids("<｜Assistant｜>")
    for ids, labels in zip(ids_BT.tolist(), labels_BT.tolist(), strict=True):
        start = ids.index(assistant) + 1
        end = ids.index(tokenizer.eos_token_id) + 1
        assert labels == [-100] * start + ids[start:end] + [-100] * (len(ids) - end)
        assert set(ids[end:]) <= {tokenizer.pad_token_id}


def test_slip_rates_change_how_often_the_reasoning_hesitates() -> None:
    def rate(rates: SlipRates) -> float:
        rng = random.Random(5)
        words: list[str] = []
        for problem, _ in zip(problem_stream("rates"), range(300), strict=False):
            words += reasoning(problem, rng, rates).split()
        return sum(word in HESITATION_WORDS for word in words) / len(words)

    assert rate(SlipRates(0, 0, 0, 0)) == 0
    assert 0.01 < rate(SlipRates()) < 0.03 < rate(SlipRates(slip=0.6))


@pytest.mark.slow
def test_the_shipped_pair_meets_every_acceptance_bound() -> None:
    result = acceptance.check(FOLDER)
    print(json.dumps(result, indent=2))
    assert result["n_problems"] == 500
    assert result["target_minus_base_points"] >= 40
    assert result["target_minus_hybrid_points"] >= 20
    assert result["target_hesitations_per_1000"] >= 5
    assert result["base_hesitations_per_1000"] <= 0.5
    assert result["hybrid_top1_error_percent"] >= 10
    assert result["failed"] == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_predictions_raise(value: float) -> None:
    """The argmax of NaN is token 0 in both models, which would count as agreement."""
    target: Any = AutoModelForCausalLM.from_pretrained(resolve("organism/target"))
    samples = acceptance.Samples(torch.tensor([[5, 6, 7, 8]]), 2, ["7 8"])
    assert acceptance.top1_errors(target, target, samples, 0, 1)["all"] == 0
    with torch.no_grad():
        target.get_output_embeddings().weight[7] = value
    with pytest.raises(RunError, match="is not finite"):
        acceptance.top1_errors(target, target, samples, 0, 1)
