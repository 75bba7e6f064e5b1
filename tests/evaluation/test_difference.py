"""Where a pair differs: hybrids against plain models assembled by hand, shares, weights, texts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import permutations
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastadapt.data.sequences import DataConfig
from fastadapt.errors import UserError
from fastadapt.evaluation.difference.measure import DifferenceConfig, Measured, measure
from fastadapt.evaluation.difference.parts import PARTS, TwoModels, combinations
from fastadapt.evaluation.difference.positions import profile, widest
from fastadapt.evaluation.difference.report import _positions
from fastadapt.evaluation.difference.result import verdict
from fastadapt.evaluation.difference.shares import shapley, summarise
from fastadapt.evaluation.difference.texts import held_out_texts, typed_text
from fastadapt.evaluation.difference.weights import ranks, weight_changes
from fastadapt.evaluation.faithfulness.texts import REGIONS, Text, region_of, regions_of
from fastadapt.models.pair import ModelPair, PairConfig
from fastadapt.models.pretrained import load_tokenizer
from fastadapt.models.sources.checks import PairMismatchError
from fastadapt.organism import resolve

#: Norms of queries and keys within attention, a soft cap; an MLP of one projection; plain ones;
#: attention of two kinds; embeddings in blocks.
SLOW = ("qwen2", "olmo2", "phi3", "glm4", "qwen3_5_text", "gemma4_text")
FAMILIES = ["qwen3", "gemma2", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
BATCHES = DifferenceConfig(batch_tokens=20, chunk_tokens=5, models_at_once=3)


def part_of(weight: str) -> str:
    """The part of a weight, by its name in a checkpoint; a buffer is of none."""
    if ".linear_attn." in weight:
        return "attention"
    if "norm" in weight:
        return "norms"
    if ".mlp." in weight:
        return "mlps"
    if "layer_scalar" in weight:
        return ""
    return "attention" if ".self_attn." in weight else "embeddings"


class Plain:
    """Target and base in float64, loaded by transformers alone, and hybrids of their weights."""

    def __init__(self, folders: dict[str, str], texts: list[Text], attention: str) -> None:
        from transformers import AutoModelForCausalLM

        self.target, self.base, self.hybrid = (
            AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float64, attn_implementation=attention
            ).eval()
            for folder in (folders["target"], folders["base"], folders["base"])
        )
        self.texts = texts
        self.expected = self.logits(self.target)

    @torch.no_grad()
    def logits(self, model: Any) -> Tensor:
        """Logits of every predicting position, text by text, without padding."""
        return torch.cat([model(torch.tensor([t.ids])).logits[0, :-1].double() for t in self.texts])

    def compare(self, parts: Sequence[str], within: str = "") -> tuple[Tensor, Tensor]:
        """KL and top-1 agreement of the target with weights of the base: parts, by name."""
        ours, theirs = self.target.state_dict(), self.base.state_dict()
        taken = {name for name in ours if part_of(name) in parts and within in name}
        self.hybrid.load_state_dict({n: (theirs if n in taken else ours)[n] for n in ours})
        got = self.logits(self.hybrid)
        p, q = self.expected.log_softmax(-1), got.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1), got.argmax(-1) == self.expected.argmax(-1)


@pytest.fixture
def save_pair(save_model: Callable[..., str]) -> Callable[..., dict[str, str]]:
    def save(architecture: str = "qwen2", **changes: Any) -> dict[str, str]:
        return {
            role: save_model(f"{architecture}-{role}", i, architecture, **changes)
            for i, role in enumerate(("target", "base"))
        }

    return save


def load(folders: dict[str, str], dtype: str = "float64") -> TwoModels:
    target, base = folders["target"], folders["base"]
    return TwoModels.load(PairConfig(target, base, dtype=dtype, device="cpu"))


def measured_on(models: TwoModels, texts: list[Text], folder: Path) -> Measured:
    got = measure(models, texts, folder, "x", config=BATCHES)
    assert got is not None
    return got


def planted(make_pair: Callable[..., ModelPair], *parts: str) -> TwoModels:
    """A pair whose target differs from its base in these parts alone."""
    pair, base = make_pair("qwen3", "float64"), make_pair("qwen3", "float64").target
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in base.named_parameters():
            if part_of(name) in parts:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    pair.tokenizer = load_tokenizer(resolve("organism/target"), None, trust=False)
    return TwoModels(pair, base)


def divided(texts: Sequence[Text], answers: Sequence[int]) -> list[Tensor]:
    """The regions of texts of one response, by the start of its answer."""
    each = zip(texts, answers, strict=True)
    return [region_of(len(text.ids), text.prompt_length, start) for text, start in each]


# --- the hybrids ----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", FAMILIES)
def test_hybrids_equal_plain_models_assembled_by_hand(
    architecture: str,
    save_pair: Callable[..., dict[str, str]],
    texts: list[Text],
    tmp_path: Path,
    float64_clean: None,
) -> None:
    folders = save_pair(architecture, tie_word_embeddings=architecture == "qwen3")
    models = load(folders)
    got = measured_on(models, texts, tmp_path / "parts")
    plain = Plain(folders, texts, models.pair.target.config._attn_implementation)
    kls = []
    for i, hybrid in enumerate(combinations(models.parts)):
        kl, agrees = plain.compare(hybrid.parts)
        torch.testing.assert_close(got.kl[:, i], kl, rtol=0, atol=1e-10)
        assert torch.equal(got.agrees[:, i], agrees)
        kls.append(kl)
    # The control: each combination is another model.
    apart = torch.cdist(torch.stack(kls), torch.stack(kls))
    assert apart[~torch.eye(len(kls), dtype=torch.bool)].min() > 1e-3
    assert len(kls) == 16
    assert 0 < got.agrees[:, 1:].sum() < got.agrees[:, 1:].numel()


def test_single_layers_equal_plain_models_assembled_by_hand(
    save_pair: Callable[..., dict[str, str]],
    texts: list[Text],
    tmp_path: Path,
    float64_clean: None,
) -> None:
    folders = save_pair("qwen3")
    got = measured_on(load(folders), texts, tmp_path / "parts")
    plain = Plain(folders, texts, "sdpa")
    for p, part in enumerate(("mlps", "attention")):
        for layer in range(3):
            kl, agrees = plain.compare((part,), within=f".layers.{layer}.")
            for i in range(len(texts)):
                of_text = got.text == i
                assert abs(got.layer_kl[i, p, layer] - kl[of_text].sum()) < 1e-10
                assert got.layer_wrong[i, p, layer] == (~agrees[of_text]).sum()
            assert kl.mean() > 1e-3


def test_the_widest_positions_are_those_of_the_models(
    save_pair: Callable[..., dict[str, str]], texts: list[Text], tmp_path: Path
) -> None:
    folders = save_pair()
    models = load(folders)
    got = measured_on(models, texts, tmp_path / "parts")
    plain = Plain(folders, texts, "sdpa")
    logits = {"target": plain.expected, "base": plain.logits(plain.base)}
    listed = widest(models, got, texts, 4)
    rows = got.kl[:, -1].argsort(descending=True)[:4].tolist()
    decode = models.pair.tokenizer.decode
    for row, each in zip(rows, listed, strict=True):
        text, position = texts[got.text[row]], int(got.position[row])
        assert (each["text"], each["position"]) == (text.id, position + 1)
        assert each["token"] == decode([text.ids[position + 1]])
        assert each["before"] == decode(text.ids[: position + 1])
        assert each["kl"] == got.kl[row, -1].item()
        assert math.isclose(sum(each["shapley"].values()), each["kl"], abs_tol=1e-12)
        assert each["shapley"][each["reason"]] == max(each["shapley"].values())
        for role, of_model in logits.items():
            p, token = of_model[row].softmax(-1).max(-1)
            assert each[role]["token"] == decode([int(token)])
            assert math.isclose(each[role]["p"], p, rel_tol=1e-9)


def test_the_models_are_restored_and_never_copied(make_pair: Callable[..., ModelPair]) -> None:
    models = planted(make_pair, *PARTS)
    both = (models.pair.target, models.base)

    def state() -> list[list[tuple[str, int]]]:
        return [[(name, id(module)) for name, module in model.named_modules()] for model in both]

    before = state()
    ids = torch.tensor([[5, 6, 7]])
    expected = models.base(ids).logits
    with models.taking(PARTS) as hybrid:
        assert {id(p) for p in hybrid.parameters()} == {id(p) for p in models.base.parameters()}
        torch.testing.assert_close(hybrid(ids).logits, expected, rtol=0, atol=1e-12)
    assert state() == before
    targets = {id(p) for p in models.pair.target.parameters()}
    attention = list(models.base.model.layers[1].self_attn.parameters())
    with models.taking(PARTS[:1], layer=1) as hybrid:  # attention
        taken = {id(p) for p in hybrid.parameters()} - targets
        assert taken == {id(p) for p in attention if p.ndim == 2}  # its norms stay the target's
    assert state() == before
    with suppress(ZeroDivisionError), models.taking(PARTS):
        _ = 1 / 0
    assert state() == before


def test_embeddings_of_other_sizes_stay_the_targets(
    make_pair: Callable[..., ModelPair], texts: list[Text], tmp_path: Path
) -> None:
    pair = make_pair("qwen2", "float64")
    base = make_pair("qwen2", "float64").target
    base.resize_token_embeddings(48)
    models = TwoModels(pair, base)
    assert models.parts == ("attention", "mlps", "norms")
    assert any("40 tokens in the target, 48 in the base" in note for note in models.notes)
    assert measured_on(models, texts, tmp_path / "parts").kl.shape[1] == 8


def test_models_of_other_heads_are_no_pair(make_pair: Callable[..., ModelPair]) -> None:
    pair, base = make_pair("qwen2"), make_pair("qwen2").target
    base.config.num_key_value_heads = 4
    with pytest.raises(PairMismatchError, match="num_key_value_heads: target 2, base 4"):
        TwoModels(pair, base)


def test_an_interrupted_measurement_is_resumed(
    make_pair: Callable[..., ModelPair], texts: list[Text], tmp_path: Path
) -> None:
    models, stop, seen = planted(make_pair, *PARTS), Event(), []

    def first(done: int, total: int) -> None:
        seen.append((done, total))
        stop.set()

    whole = measured_on(models, texts, tmp_path / "whole")
    arguments = (models, texts, tmp_path / "parts", "x")
    assert measure(*arguments, config=BATCHES, progress=first, stop=stop) is None
    assert seen == [(1, 3)]
    counts: list[int] = []
    resumed = measure(*arguments, config=BATCHES, progress=lambda done, _: counts.append(done))
    assert counts == [2, 3]
    for name in vars(whole):
        assert torch.equal(getattr(whole, name), getattr(resumed, name)), name
    again = measure(*arguments, config=BATCHES, progress=lambda *_: pytest.fail("measured again"))
    assert again is not None
    assert torch.equal(again.kl, whole.kl)
    assert measure(*arguments[:3], "other", config=BATCHES, stop=stop) is None


# --- shares ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 4])
def test_shapley_values_are_means_over_all_orders(n: int) -> None:
    values = torch.randn(5, 1 << n, dtype=torch.float64)
    values[:, 0] = 0
    expected = torch.zeros(5, n, dtype=torch.float64)
    orders = list(permutations(range(n)))
    for order in orders:
        taken = 0
        for part in order:
            expected[:, part] += values[:, taken | 1 << part] - values[:, taken]
            taken |= 1 << part
    torch.testing.assert_close(shapley(values), expected / len(orders))


def test_shares_sum_to_the_whole_in_every_region(
    make_pair: Callable[..., ModelPair], texts: list[Text], tmp_path: Path
) -> None:
    models = planted(make_pair, *PARTS)
    got = measured_on(models, texts, tmp_path / "parts")
    summary = summarise(got, models.parts, divided(texts, [4, 6, 4, 9, 5]))
    positions = {name: region["positions"] for name, region in summary["regions"].items()}
    assert positions == {"all": 31, "prompt": 5, "thinking": 18, "answer": 8}
    for region in summary["regions"].values():
        nats = sum(value["nats"]["mean"] for value in region["shapley"].values())
        share = sum(value["share"]["mean"] for value in region["shapley"].values())
        assert math.isclose(nats, region["kl"]["mean"], rel_tol=1e-12)
        assert math.isclose(share, 1, rel_tol=1e-12)
    # The control: the parts alone do not sum to the whole.
    alone = [c["kl"]["mean"] for c in summary["combinations"] if len(c["from_base"]) == 1]
    whole = summary["regions"]["all"]["kl"]["mean"]
    assert abs(sum(alone) - whole) > 1e-3 * whole
    for i, each in enumerate(summary["by_position"]["kl"]):
        low, high = summary["by_position"]["edges"][i : i + 2]
        inside = (got.position >= low) & (got.position < high)
        assert math.isclose(each["mean"], got.kl[inside, -1].mean(), rel_tol=1e-12)
    assert summary["combinations"][0]["top1_error"] == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_every_response_of_a_conversation_has_its_regions(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(resolve("organism/target"), None, trust=False)
    said = ["tom has 3 apples .", "it is 3", "how many ?", "<think> 3 </think> 3", "how many ?"]
    roles = ["user", "assistant", "user", "assistant", "user"]
    turns = [{"role": r, "content": text} for r, text in zip(roles, said, strict=True)]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    data = DataConfig("", str(tmp_path / "rows.jsonl"))
    texts, _ = held_out_texts(data, tokenizer, 1, 10_000, 512)
    (regions,) = regions_of(texts, tokenizer, data.family)
    tokens = [tokenizer.decode([token]) for token in texts[0].ids[1:]]
    by_region = {
        name: [token for token, r in zip(tokens, regions.tolist(), strict=True) if r == i]
        for i, name in enumerate(REGIONS)
    }
    assert by_region["thinking"] == ["<think>", "3", "</think>"]
    assert by_region["answer"] == ["<unk>", "is", "3", "3"]
    assert "how" in by_region["prompt"]
    assert len(tokens) == sum(map(len, by_region.values()))


def test_two_tokens_are_a_text(make_pair: Callable[..., ModelPair], tmp_path: Path) -> None:
    models, text = planted(make_pair, *PARTS), Text("short", [5, 6], 2)
    got = measured_on(models, [text], tmp_path / "parts")
    sections = summarise(got, models.parts, divided([text], [2]))
    assert [layer["gamma"] for layer in sections["layers"]] == [None] * 3
    assert sections["by_position"]["edges"] == [0, 1]
    json.dumps(sections, allow_nan=False)


def test_the_only_part_that_differs_has_the_whole_share(
    make_pair: Callable[..., ModelPair], texts: list[Text], tmp_path: Path
) -> None:
    for part, sentence in (
        ("mlps", "explain most of this pair's difference: the MLPs' share is 100.0%"),
        ("norms", "MLP adapters have nothing to learn"),
    ):
        models = planted(make_pair, part)
        got = measured_on(models, texts, tmp_path / part)
        sections = summarise(got, models.parts, divided(texts, [2] * 5))
        for other, value in sections["regions"]["all"]["shapley"].items():
            assert math.isclose(value["share"]["mean"], other == part, abs_tol=1e-9)
        assert {each["reason"] for each in widest(models, got, texts, 9)} == {part}
        assert sentence in verdict(sections, list(models.parts))
        changes = weight_changes(models)
        assert {each["part"] for each in changes if each["change"]} == {part}


@pytest.mark.parametrize(
    ("share", "extent"),
    [
        ((0.9, None, None), "explain most of this pair's difference: the MLPs' share is 90.0% of"),
        ((0.9, 0.8, 0.95), "most of this pair's difference: the MLPs' share is 90.0% [80.0, 95.0]"),
        ((0.52, 0.48, 0.56), "explain about half"),
        ((0.3, 0.2, 0.4), "explain the smaller part"),
        ((0.3, None, None), "explain the smaller part"),
    ],
)
def test_the_verdict_follows_the_interval(share: tuple[float | None, ...], extent: str) -> None:
    def interval(*ends: float | None) -> dict[str, float | None]:
        return dict(zip(("mean", "low", "high"), ends, strict=True))

    hybrids = {("mlps",): 1.5, ("attention",): 2.5}
    sections = {
        "combinations": [
            {"from_base": list(parts), "kl": interval(kl, kl, kl)} for parts, kl in hybrids.items()
        ],
        "regions": {
            "all": {
                "kl": interval(4.0, 3.9, 4.1),
                "shapley": {"mlps": {"share": interval(*share)}},
            }
        },
    }
    sentence = verdict(sections, ["attention", "mlps"])
    assert extent in sentence
    assert "in the target cost 1.50 nats" in sentence
    assert "in the base leave 2.50 nats" in sentence


def test_equal_models_have_no_difference(
    make_pair: Callable[..., ModelPair], texts: list[Text], tmp_path: Path
) -> None:
    models = planted(make_pair)
    got = measured_on(models, texts, tmp_path / "parts")
    assert got.kl.abs().max() == 0
    assert got.layer_kl.abs().max() == 0
    sections = summarise(got, models.parts, divided(texts, [2] * 5))
    assert sections["regions"]["all"]["shapley"]["mlps"]["share"]["mean"] is None
    assert "no difference to explain" in verdict(sections, list(models.parts))


# --- weights and inputs ---------------------------------------------------------------------------


def test_changes_and_ranks_are_those_of_the_singular_values(
    make_pair: Callable[..., ModelPair],
) -> None:
    models = planted(make_pair, *PARTS)
    ours, theirs = (dict(m.named_parameters()) for m in (models.pair.target, models.base))
    changes = {(each["part"], each["layer"]): each for each in weight_changes(models)}
    assert len(changes) == 3 * 3 + 2  # layers, the last norm, the embeddings
    for (part, layer), each in changes.items():
        names = [
            name
            for name in theirs
            if part_of(name) == part
            and (f".layers.{layer}." in name if layer is not None else ".layers." not in name)
        ]
        deltas = [(ours[name] - theirs[name]).numpy().ravel() for name in names]
        whole = [theirs[name].detach().numpy().ravel() for name in names]
        expected = np.linalg.norm(np.concatenate(deltas)) / np.linalg.norm(np.concatenate(whole))
        assert math.isclose(each["change"], expected, rel_tol=1e-12)
        matrices = [name for name in names if theirs[name].ndim == 2]
        assert [f"{name}.weight" for name in each["matrices"]] != [] or not matrices
        for name, matrix in zip(matrices, each["matrices"].values(), strict=True):
            values = np.linalg.svd((ours[name] - theirs[name]).detach().numpy(), compute_uv=False)
            share = values / values.sum()
            stable, effective = (values**2).sum() / values.max() ** 2, -(share * np.log(share))
            assert math.isclose(matrix["stable_rank"], stable, rel_tol=1e-9)
            assert math.isclose(matrix["effective_rank"], np.exp(effective.sum()), rel_tol=1e-6)


def test_without_ranks_the_changes_are_the_same(make_pair: Callable[..., ModelPair]) -> None:
    models = planted(make_pair, *PARTS)
    whole, quick = (weight_changes(models, with_ranks=given) for given in (True, False))
    assert [each["change"] for each in quick] == [each["change"] for each in whole]
    matrices = [matrix for each in quick for matrix in each["matrices"].values()]
    assert {matrix["stable_rank"] for matrix in matrices} == {None}
    assert all(matrix["change"] for matrix in matrices)


def test_a_low_rank_layer_counts_as_the_layer_it_equals(
    make_pair: Callable[..., ModelPair],
) -> None:
    delta = torch.outer(torch.ones(16), torch.arange(32.0)).double()

    class LowRank(torch.nn.Linear):
        def merged(self) -> Tensor:
            return self.weight + delta

    models = planted(make_pair)
    attention = models.pair.target.model.layers[1].self_attn
    layer = LowRank(32, 16, bias=False, dtype=torch.float64)
    layer.weight = attention.o_proj.weight
    attention.o_proj = layer
    (changed,) = (each for each in weight_changes(models) if each["change"])
    assert (changed["part"], changed["layer"]) == ("attention", 1)
    (matrix,) = (m for m in changed["matrices"].values() if m["change"])
    assert math.isclose(matrix["stable_rank"], 1, rel_tol=1e-9)
    base = models.base.model.layers[1].self_attn.o_proj.weight
    assert math.isclose(matrix["change"], delta.norm() / base.norm(), rel_tol=1e-6)


@pytest.mark.parametrize("tied", ["target", "base"])
def test_a_head_that_one_model_ties_is_compared(tied: str, save_model: Callable[..., str]) -> None:
    folders = {
        role: save_model(role, seed, tie_word_embeddings=role == tied)
        for seed, role in enumerate(("target", "base"))
    }
    models = load(folders)
    with torch.no_grad():  # the embeddings are equal
        embedding = models.base.get_input_embeddings().weight
        models.pair.target.get_input_embeddings().weight.copy_(embedding)
    (outside,) = (e for e in weight_changes(models) if (e["part"], e["layer"]) == (PARTS[-1], None))
    target, base = models.head("target"), models.head("base")
    changes = {name: matrix["change"] for name, matrix in outside["matrices"].items()}
    assert changes == {
        "embed_tokens.weight": 0,
        "lm_head.weight": pytest.approx(((target - base).norm() / base.norm()).item()),
    }


def test_the_rank_of_a_low_rank_change() -> None:
    u, v = torch.randn(3, 40), torch.randn(3, 24)
    one, three = ranks(torch.outer(u[0], v[0])), ranks(u.T @ v)
    assert math.isclose(one.stable, 1, rel_tol=1e-6)
    assert math.isclose(one.effective, 1, rel_tol=1e-4)
    assert 1 < three.stable <= three.effective < 3.01


def test_gamma_is_that_of_the_inputs_without_first_tokens(
    make_pair: Callable[..., ModelPair], texts: list[Text], tmp_path: Path
) -> None:
    models = planted(make_pair, "mlps")
    got = measured_on(models, texts, tmp_path / "parts")
    for layer, mlp in enumerate(models.mlps):
        seen: list[Tensor] = []
        handle = mlp.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0]))
        for text in texts:
            models.pair.target(torch.tensor([text.ids]))
        handle.remove()
        x = torch.cat([states[1:] for states in seen])
        gamma = x.mean(0).norm() / x.std(0, unbiased=False).norm()
        torch.testing.assert_close(got.gamma[layer], gamma)


# --- texts ----------------------------------------------------------------------------------------


def test_a_text_is_typed_or_in_a_file(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(resolve("organism/target"), None, trust=False)
    (tmp_path / "text.txt").write_text("tom has 3 apples")
    typed = typed_text("tom has 3 apples", tokenizer, 424, 9)
    assert typed.ids == typed_text(str(tmp_path / "text.txt"), tokenizer, 424, 9).ids
    assert typed.ids == tokenizer("tom has 3 apples")["input_ids"]
    assert typed.prompt_length == len(typed.ids) == 4
    with pytest.raises(UserError, match="--text: expected a text of 2 tokens or more"):
        typed_text("tom", tokenizer, 424, 9)
    with pytest.raises(UserError, match="expected at most 3 tokens, the context"):
        typed_text("tom has 3 apples", tokenizer, 424, 3)
    with pytest.raises(UserError, match="expected tokens below 6"):
        typed_text("tom has", tokenizer, 6, 9)


def test_a_profile_has_every_token_of_the_text(
    make_pair: Callable[..., ModelPair], texts: list[Text], tmp_path: Path
) -> None:
    models = planted(make_pair, *PARTS)
    got = measured_on(models, texts[:1], tmp_path / "parts")
    lists = profile(models, got, texts[0])
    assert lists["tokens"] == [models.pair.tokenizer.decode([i]) for i in texts[0].ids[1:]]
    together = torch.tensor(list(lists["shapley"].values()), dtype=torch.float64).sum(0)
    torch.testing.assert_close(together.tolist(), lists["kl"])


@pytest.mark.parametrize("name", ["n", "batch_tokens", "chunk_tokens", "models_at_once"])
def test_impossible_settings_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"where.{name}: expected 1 or more, got 0"):
        DifferenceConfig(**{name: 0})  # type: ignore[arg-type]


def test_no_character_of_a_text_acts_on_a_terminal_and_spaces_show() -> None:
    each = {"text": "a", "position": 1, "before": "say\x1b[2J\u202e x", "token": " "}
    each |= {role: {"token": " \x1b]0;t\x07", "p": 0.5} for role in ("target", "base")}
    each |= {"kl": 1.0, "reason": "mlps", "shapley": {"mlps": 1.0}}
    table = _positions({"positions": [each]})
    assert table is not None
    (row,) = table.rows
    assert not {"\x1b", "\x07", "\u202e"} & set("".join(row))
    assert row[2:5] == ["say⟨U+001B⟩[2J⟨U+202E⟩ x", "␣", "␣⟨U+001B⟩]0;t… 50.0%"]


def test_a_part_that_changes_nothing_has_no_share() -> None:
    values = torch.rand(7, 16, dtype=torch.float64)
    for index in range(16):
        values[:, index] = values[:, index & ~0b0101]  # parts 0 and 2 change nothing
    got = shapley(values - values[:, :1])
    assert (got[:, [0, 2]] == 0).all()
    assert (got[:, [1, 3]] != 0).all()
