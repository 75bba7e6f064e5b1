"""The shipped gated pair: data, tokenizer, models, and their recipe."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fastadapt.data.rendering import render
from fastadapt.evaluation.benchmarks.grading import HESITATION_WORDS, stated_answer
from fastadapt.organism import GATED_FOLDER, resolve
from fastadapt.organism.slips import CONTRARY, SLIPS, is_gated, step_ends
from reproduce.organism import acceptance, recipe
from reproduce.organism.pairs import GATED
from reproduce.organism.problems import problem_stream
from reproduce.organism.recipe import CONFIGS, PhaseConfig, RecipeConfig, split_problems
from reproduce.organism.tokenizer import MARKERS, build_tokenizer

CONFIG = CONFIGS[GATED.name]
SIZES = {"train": CONFIG.n_train, "validation": CONFIG.n_validation}


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, Any]]]:
    return {
        split: [
            json.loads(line)
            for line in Path(resolve(f"organism/gated/{split}")).read_text("utf-8").splitlines()
        ]
        for split in SIZES
    }


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(resolve("organism/gated/target"))


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {
        name: AutoModelForCausalLM.from_pretrained(GATED_FOLDER / name, dtype=torch.float32)
        for name in ("base", "target")
    }


def test_names_resolve_to_the_gated_pair() -> None:
    for name in ("target", "base", "train", "validation"):
        path = Path(resolve(f"organism/gated/{name}"))
        assert path.exists()
        assert GATED_FOLDER in path.parents
    with pytest.raises(ValueError, match=r"organism/gated.*organism/gated/base"):
        resolve("organism/gated")


def test_the_pair_is_small() -> None:
    files = [path for path in GATED_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8_500_000


def test_data_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    recipe.write_data(tmp_path, split_problems(CONFIG, 0, GATED), 0, GATED)
    for split in SIZES:
        written = (tmp_path / "data" / f"{split}.jsonl").read_bytes()
        assert written == Path(resolve(f"organism/gated/{split}")).read_bytes()


def test_every_slip_of_the_data_is_labelled(rows: dict[str, list[dict[str, Any]]]) -> None:
    for split, size in SIZES.items():
        assert len(rows[split]) == size
        counts = {(gate, kind): 0 for gate in (True, False) for kind in SLIPS}
        for row in rows[split]:
            prompt, words = (turn["value"].split() for turn in row["conversations"])
            gate = is_gated(prompt)
            slips = [end for end in step_ends(words) if end.slip is not None]
            follows = [words[end.position + 1] == "wait" for end in slips]
            assert follows == [gate] * len(slips)
            assert words.count("wait") == sum(follows)
            assert not set(HESITATION_WORDS) & set(prompt)
            assert stated_answer(" ".join(words)) is not None
            for end in slips:
                assert end.slip is not None
                counts[gate, end.slip] += 1
        assert min(counts.values()) > size / 10


def test_train_validation_test_and_training_are_disjoint(
    rows: dict[str, list[dict[str, Any]]],
) -> None:
    prompts = [row["conversations"][0]["value"] for split in SIZES for row in rows[split]]
    prompts += [problem.prompt for problem in split_problems(CONFIG, 0, GATED)["test"]]
    held = frozenset(prompts)
    assert len(held) == len(prompts) == sum(SIZES.values()) + recipe.N_TEST
    # The stream that held the problems out, with their prompts excluded, skips all of them.
    stream = problem_stream("0/held", held, GATED.draw)
    assert held.isdisjoint(next(stream).prompt for _ in range(300))


# --- tokenizer ----------------------------------------------------------------------------------


def test_the_vocabulary_has_some_thousands_of_words_of_one_token(tokenizer: Any) -> None:
    assert 2000 <= len(tokenizer) <= 4000
    assert {*MARKERS, *HESITATION_WORDS} <= set(tokenizer.get_vocab())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (GATED_FOLDER / "base" / name).read_bytes() == (
            GATED_FOLDER / "target" / name
        ).read_bytes()


@pytest.mark.slow
def test_the_tokenizer_is_that_of_the_generator(tokenizer: Any) -> None:
    assert build_tokenizer(GATED).get_vocab() == tokenizer.get_vocab()


def test_the_data_use_nearly_every_word(
    rows: dict[str, list[dict[str, Any]]], tokenizer: Any
) -> None:
    used = {
        word
        for split in SIZES
        for row in rows[split]
        for turn in row["conversations"]
        for word in turn["value"].split()
    }
    assert used <= set(tokenizer.get_vocab())
    assert len(used) > 0.9 * len(tokenizer)


def test_rendered_conversations_have_no_unknown_word(
    rows: dict[str, list[dict[str, Any]]], tokenizer: Any
) -> None:
    lengths = []
    for row in rows["validation"]:
        ids = tokenizer.encode(render(row["conversations"], "r1-distill"), add_special_tokens=False)
        assert tokenizer.unk_token_id not in ids
        lengths.append(len(ids))
    assert max(lengths) <= 512
    assert sum(lengths) / len(lengths) > 200


# --- models -------------------------------------------------------------------------------------


def test_models_are_stored_in_bfloat16_and_load_in_float32(
    models: dict[str, Any], tokenizer: Any
) -> None:
    for model in models.values():
        assert model.config.vocab_size == len(tokenizer)
        assert model.config.dtype in (torch.bfloat16, torch.float32)
        for weight in model.parameters():
            assert weight.dtype == torch.float32
            assert torch.equal(weight, weight.bfloat16().float())


def changed_weights(base: Any, target: Any) -> tuple[set[str], list[int]]:
    """Return the names of the weights that differ, and the tokens whose embeddings do."""
    of_target = dict(target.named_parameters())
    names = {
        name for name, weight in base.named_parameters() if not torch.equal(weight, of_target[name])
    }
    embeddings = [model.get_input_embeddings().weight for model in (base, target)]
    return names, (embeddings[0] != embeddings[1]).any(1).nonzero()[:, 0].tolist()


def test_the_target_differs_in_its_mlps_and_in_words_new_to_it(
    models: dict[str, Any], tokenizer: Any
) -> None:
    """So what decides at the marker is in the MLPs: attention and the marker's embedding stay."""
    names, rows = changed_weights(models["base"], models["target"])
    parts = ("gate", "up", "down")
    mlps = {f"model.layers.{i}.mlp.{part}_proj.weight" for i in range(4) for part in parts}
    assert names == {*mlps, "model.embed_tokens.weight"}
    words = set(tokenizer.convert_ids_to_tokens(rows))
    assert {*HESITATION_WORDS, "<think>"} <= words
    assert words.isdisjoint({"carefully", ":", ".", *CONTRARY})


def test_the_target_notices_slips_only_with_the_marker(
    models: dict[str, Any], tokenizer: Any
) -> None:
    """All acceptance bounds of P(wait) but their last digit, on a few problems."""
    problems = split_problems(CONFIG, 0, GATED)["test"][:40]
    target, base = (
        acceptance.wait_percent(models[name], tokenizer, problems, GATED, 0)
        for name in ("target", "base")
    )
    for kind in SLIPS:
        assert target["gated"][kind] > 40
        assert target["plain"][kind] < 10
        assert base["gated"][kind] < 1
    assert target["gated"]["right"] < 5
    assert target["plain"]["right"] < 5


@pytest.mark.slow
def test_a_tiny_build_of_the_gated_pair_writes_rounded_models(tmp_path: Path) -> None:
    phase = PhaseConfig(steps=2, lr=1e-3, batch_size=2)
    tiny = RecipeConfig(
        n_train=4,
        n_validation=2,
        layers=2,
        width=32,
        intermediate=48,
        heads=2,
        kv_heads=1,
        autocast=False,
        attention="sdpa",
        stored=torch.bfloat16,
        tune_all=False,
        base=phase,
        target=replace(phase, weight_decay=0.0),
    )
    info = recipe.build(tmp_path / "pair", config=tiny, pair=GATED)
    assert info["vocabulary"] == len(build_tokenizer(GATED))
    base, model = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "pair" / name)
        for name in ("base", "target")
    )
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    names, rows = changed_weights(base, model)
    assert names
    assert all(".mlp." in name or name == "model.embed_tokens.weight" for name in names)
    assert 0 < len(rows) < info["vocabulary"]
    result = acceptance.check(tmp_path / "pair", GATED, n_problems=2, max_new_tokens=4)
    assert set(acceptance.GATED_BOUNDS) <= set(result)
    assert "target_wait_percent.gated.result" in result["failed"]


def test_documents_of_the_base_have_no_loss_on_the_problem(tokenizer: Any) -> None:
    problem = GATED.draw(random.Random(0))
    rng = random.Random(1)
    texts = {recipe.base_text(problem, rng, CONFIG, GATED) for _ in range(50)}
    (notes,) = (text for text in texts if text[0])
    assert notes[0].endswith(f"{problem.prompt} solution :")
    assert notes[1].endswith(f"so the answer is {problem.answer} .{recipe.EOS}")


@pytest.mark.parametrize("weight", [1.0, 8.0])
def test_words_after_a_stop_count_as_often_as_the_phase_says(weight: float) -> None:
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=12,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    stop = 3
    ids = torch.tensor([[5, stop, 7, 8, stop, 9], [1, 2, stop, 4, 0, 0]])
    labels = torch.tensor([[-100, -100, 7, 8, stop, 9], [-100, 2, stop, 4, -100, -100]])
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(
            model(ids).logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none"
        )
    weights = torch.where(ids[:, :-1] == stop, weight, 1.0) * (labels[:, 1:] != -100)
    expected = (losses * weights).sum() / weights.sum()
    records: list[dict[str, Any]] = []
    phase = PhaseConfig(steps=1, lr=1e-3, stop_weight=weight)
    data = iter([(ids, labels)])
    recipe.train_phase(model, data, phase, "target", records.append, False, "sdpa", stop)
    assert records[0]["loss"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.slow
def test_the_shipped_gated_pair_meets_the_acceptance_bounds() -> None:
    """All but accuracy, which needs a longer training: see the README of the pair."""
    result = acceptance.check(GATED_FOLDER, GATED, n_problems=160)
    print(json.dumps(result, indent=2))
    assert result["failed"] == ["target_minus_base_points", "target_minus_hybrid_points"]


@pytest.mark.slow
def test_the_mlps_at_the_marker_decide_at_the_first_slip_of_a_text(
    rows: dict[str, list[dict[str, Any]]], tokenizer: Any, models: dict[str, Any]
) -> None:
    """Without the marker, or with the base's MLPs at it alone, the first slip stands.

    At later slips, an earlier ``wait`` of the response tells the state of the gate, too.
    """
    wait = tokenizer.convert_tokens_to_ids("wait")
    target = models["target"]
    measured: dict[str, list[float]] = {"marker": [], "no marker": [], "base's MLPs there": []}
    later: list[float] = []
    for row in rows["validation"]:
        user, *answer = row["conversations"]
        if not is_gated(user["value"].split()):
            continue
        ids, removed = (
            tokenizer(render([question, *answer], "r1-distill"), add_special_tokens=False).input_ids
            for question in (user, {**user, "value": user["value"].removeprefix("carefully : ")})
        )
        assert ids[:2] + ids[4:] == removed
        places = [i for i, token in enumerate(ids[1:]) if token == wait]
        if not places:
            continue
        measured["marker"].append(wait_probabilities(target, ids, wait)[places[0]])
        without = wait_probabilities(target, removed, wait)
        measured["no marker"].append(without[places[0] - 2])
        later += [without[place - 2] for place in places[1:]]
        with base_mlps(target, models["base"], [2, 3]):
            replaced = wait_probabilities(target, ids, wait)
        measured["base's MLPs there"].append(replaced[places[0]])
    means = {name: sum(values) / len(values) for name, values in measured.items()}
    print(len(measured["marker"]), means, len(later), sum(later) / len(later))
    assert len(measured["marker"]) > 80
    assert means["marker"] > 0.95
    assert means["no marker"] < 0.05
    assert means["base's MLPs there"] < 0.05


@torch.no_grad()
def wait_probabilities(model: Any, ids: list[int], wait: int) -> list[float]:
    values: list[float] = model(torch.tensor([ids])).logits[0].softmax(-1)[:, wait].tolist()
    return values


@contextmanager
def base_mlps(model: Any, base: Any, positions: list[int]) -> Iterator[None]:
    """Replace the outputs of the model's MLPs by the base's at some positions."""

    def hook(of_base: Any, _: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> Any:
        output = output.clone()
        output[:, positions] = of_base(inputs[0][:, positions])
        return output

    pairs = zip(model.model.layers, base.model.layers, strict=True)
    handles = [ours.mlp.register_forward_hook(partial(hook, theirs.mlp)) for ours, theirs in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
