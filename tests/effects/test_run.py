"""A loaded run and what it shows: the numbers of the library's functions, with hostile texts."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from by_hand import L, TinyRun, kl_by_hand, models_by_hand, random_adapters
from stores import StoreText, make_store
from transformers.utils import logging

import fastadapt
from fastadapt import ModelPair, PairConfig, ReplacementModel, UserError, save_adapters
from fastadapt.adapter.files import CARD
from fastadapt.effects.generate import GenerateConfig, Generated, generate
from fastadapt.effects.texts import unit_lines
from fastadapt.effects.trace import firings, promotes
from fastadapt.effects.views import FeatureCard, Responses
from fastadapt.features.store.details import read_details
from fastadapt.features.store.scales import Scales
from fastadapt.features.store.schema import DESCRIPTIONS, REGIONS, SCALES
from fastadapt.interventions import Intervention
from fastadapt.interventions.files import intervene, no_features
from fastadapt.reporting.formatting import number
from fastadapt.reporting.visible import token_text, visible

#: 16 features per layer, with a store of features.
FINISHED = Path(__file__).parents[1] / "cli" / "old_files" / "finished"
IDS = [5, 9, 23, 7, 31, 8, 11]
EVIL = "<script>alert(1)</script>\"'><img/src=x/onerror=alert(1)>&\u202e"


class Page(HTMLParser):
    """The elements, attributes and text of a piece of HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.names: set[str] = set()
        self.titles: list[str] = []
        self.styles: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}
        self.titles += [value or "" for name, value in attrs if name == "title"]
        self.styles += [value or "" for name, value in attrs if name == "style"]

    def handle_data(self, data: str) -> None:
        self.text += data


#: Elements and attributes of the templates.
TAGS = {"div", "style", "p", "h4", "span", "b", "i", "bdi", "mark", "details", "summary"}
TAGS |= {"table", "thead", "tbody", "tr", "th", "td"}
ATTRIBUTES = {"class", "style", "title"}


def page(view: Any) -> Page:
    """Read the HTML of a view, which may have elements of the templates only."""
    read = Page(view._repr_html_())
    assert read.tags <= TAGS
    assert read.names <= ATTRIBUTES
    return read


def test_features_are_those_of_the_functions(tiny_run: TinyRun) -> None:
    run = fastadapt.load(tiny_run.folder, device="cpu")
    shown = run.features(IDS, top=2)
    assert shown.ids == IDS
    assert shown.fires == firings(run, IDS)
    assert max(map(len, shown.fires)) > 2
    strongest = [here[0] for here in shown.fires if here]
    for firing in strongest:
        assert shown.promoted[firing.pair] == promotes(run, [firing.pair])[firing.pair]
    rows = [line.split("│") for line in repr(shown).split("\n\n")[0].splitlines()[2:]]
    assert [row[1].strip() for row in rows] == [f"w{i}" for i in IDS]
    html = page(shown)
    for row, here in zip(rows, shown.fires, strict=True):
        for firing in here[:2]:
            said = f"{firing.layer}/{firing.feature} {number(firing.value)}"
            assert f"{said} {shown.promoted[firing.pair][0]}" in row[2]
            assert f"{said} {shown.promoted[firing.pair][0]}" in html.text
        assert (f"+{len(here) - 2}" in row[2]) == (len(here) > 2)
    assert repr(run.features(torch.tensor(IDS), top=2)) == repr(shown)


@torch.no_grad()
def test_kls_are_those_of_plain_models_and_colour_the_tokens(
    tiny_run: TinyRun, float64_clean: None
) -> None:
    run = fastadapt.load(tiny_run.folder, dtype="float64", device="cpu")
    shown = run.kl(IDS, base=True)
    models = models_by_hand(tiny_run, random_adapters())
    logits = {name: model(torch.tensor([IDS])).logits[0] for name, model in models.items()}
    for name in ("base", "hybrid", "adapter"):
        kl = kl_by_hand(logits["target"], logits[name])
        assert (torch.tensor(shown[name], dtype=torch.float64) - kl).abs().max() < 1e-10
        assert shown.mean(name) == pytest.approx(float(kl.mean()), abs=1e-10)
        assert f"{name} {number(shown.mean(name))}" in repr(shown)
    html = page(shown)
    shades = [float(style.split(",")[-1].rstrip(")")) for style in html.styles]
    every = [*shown["base"], *shown["hybrid"], *shown["adapter"]]
    assert shades == pytest.approx([0.75 * (1 - math.exp(-size)) for size in every], abs=6e-4)
    assert max(shades) > 2 * min(shades)
    for size in every:
        assert f"KL {number(size)} after" in " ".join(html.titles)
        assert number(size) in html.text
    with pytest.raises(UserError, match="expected one of hybrid, adapter, got 'base'"):
        run.kl(IDS)["base"]


def test_responses_are_those_of_scaled_features(tiny_run: TinyRun) -> None:
    run = fastadapt.load(tiny_run.folder, device="cpu")
    settings = GenerateConfig(max_new_tokens=8)
    whole, *_ = generate(run, IDS, settings)
    changed = []
    for scale, factors in (
        ({(0, 1): 0.0}, {(0, 1): 0.0}),
        ({(2, 8): -2.5, "1/3": 0.0}, {(2, 8): -2.5, (1, 3): 0.0}),
    ):
        responses = run.generate(IDS, scale=scale, max_new_tokens=8)
        (expected,) = generate(run, IDS, settings, factors)
        assert responses["adapter"] == expected
        assert repr(responses) == responses.text == expected.text
        changed.append(expected.tokens != whole.tokens)
    assert any(changed)
    several = run.generate(IDS, models=["hybrid", "target"], max_new_tokens=4)
    assert repr(several).startswith("--- hybrid\n")
    assert "\n\n--- target\n" in repr(several)
    assert several["target"].text in page(several).text
    with pytest.raises(UserError, match="feature 2/8 is scaled twice"):
        run.generate(IDS, scale={(2, 8): 0.0, "2/8": 1.0})
    with pytest.raises(UserError, match="expected one of hybrid, target, got 'adapter'"):
        several["adapter"]
    with pytest.raises(UserError, match="no chat format recorded"):
        run.generate("w5 w9")


def test_a_card_is_that_of_the_terminal_and_needs_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fastadapt.load(shutil.copytree(FINISHED, tmp_path / "run"), device="cpu")
    monkeypatch.setattr(ModelPair, "load", None)
    assert run.store is not None
    (unit,) = read_details(run.store, [(2, 7)])
    assert repr(run.feature(2, 7)) == "\n".join(unit_lines(unit))
    html = page(run.feature(2, 7))
    for token, _ in [*unit.promoted, *unit.suppressed]:
        assert token in html.text
    for example in unit.examples:
        assert f"{example.before}{example.token}{example.after}" in html.text
    with pytest.raises(UserError, match="feature: expected 0 to 15, got 16"):
        run.feature(2, 16)
    with pytest.raises(UserError, match="examples: expected 0 or more, got -1"):
        run.feature(2, 7, examples=-1)
    with pytest.raises(UserError, match="top: expected 0 or more, got -1"):
        run.features(IDS, top=-1)
    for text in (repr(run), page(run).text):
        assert "organism/target" in text
        assert "adapter, λ=0.03" in text
        assert "4 × 16" in text
        assert "0.805" in text  # KL of the adapter in summary.json
        assert "tokens of" in text


def test_scales_are_shown_on_a_card(tmp_path: Path) -> None:
    run = fastadapt.load(shutil.copytree(FINISHED, tmp_path / "run"), device="cpu")
    assert run.store is not None
    assert "In the base" not in page(run.feature(2, 7)).text  # a store without scales
    row = {"layer": 2, "feature": 7, "base_share": -0.25, "base_scale": -0.5, "positions": 9}
    row |= {"target_scale": 2.0, "difference_scale": 1.5}
    run.store.add("scales", pa.Table.from_pylist([row], schema=SCALES))
    card = run.feature(2, 7)
    assert card.details.scales == Scales("opposed", -0.25, -0.5, 2.0, 1.5, 9)
    html = page(card).text
    assert "In the base" in html
    assert "-25.0%" in html
    line = "  in the base   -25.0%, opposed: the MLPs write -0.500 (base) and 2.00 (target) times"
    assert line in repr(card)


def test_a_description_is_shown_beside_its_feature(tmp_path: Path) -> None:
    run = fastadapt.load(shutil.copytree(FINISHED, tmp_path / "run"), device="cpu")
    assert run.store is not None
    strongest = run.features("tom has 3 apples").totals()[0]
    row = {"layer": strongest.layer, "feature": strongest.feature, "variant": "top"}
    row |= {"description": f"fires on numbers {EVIL}", "judge": "a judge", "shown": [0]}
    run.store.add("descriptions", pa.Table.from_pylist([row], schema=DESCRIPTIONS))
    shown = run.features("tom has 3 apples")
    assert list(shown.descriptions) == [strongest.pair]
    assert "fires on numbers" in repr(shown)
    html = page(shown)
    assert "fires on numbers <script>" in html.text
    assert any("fires on numbers <script>" in title for title in html.titles)


def test_hostile_texts_stay_texts(save_model: Callable[..., str], tmp_path: Path) -> None:
    target, base = (save_model(name, i, words=EVIL) for i, name in enumerate(("target", "base")))
    folder = tmp_path / "run"
    save_adapters(random_adapters(), folder / "adapter", {"target": target, "base": base})
    run = fastadapt.load(folder, device="cpu")
    texts = [StoreText(IDS, [REGIONS.index("answer")] * len(IDS), "d", f"{EVIL}id")]
    fires = [np.ones((1, len(IDS), 2), np.float32)]
    store = make_store(tmp_path / "store", texts, fires, [f"{EVIL}{i}" for i in range(40)]).store
    (unit,) = read_details(store, [(0, 1)])
    views: list[Any] = [run.features(IDS), run.kl(IDS), FeatureCard(unit)]
    views += [run.generate(IDS, models=["target"], max_new_tokens=4)]
    for view in views:
        assert token_text(EVIL) in page(view).text
        assert "\u202e" not in view._repr_html_()


def test_no_control_character_reaches_a_terminal_or_a_page(tmp_path: Path) -> None:
    run = fastadapt.load(shutil.copytree(FINISHED, tmp_path / "run"), device="cpu")
    assert run.store is not None
    odd = "\x1b[2J\u202e"
    row = {"layer": 2, "feature": 7, "variant": "top", "shown": [0]}
    row |= {"description": f"numbers {odd}", "judge": f"judge {odd}"}
    run.store.add("descriptions", pa.Table.from_pylist([row], schema=DESCRIPTIONS))
    responses = Responses([Generated("adapter", [5], f"said {odd}\nmore", "eos")])
    for view, said in ((run.feature(2, 7), "judge "), (responses, "said ")):
        for text in (repr(view), view._repr_html_()):
            assert f"{said}{visible(odd)}" in text
            assert not {"\x1b", "\u202e"} & set(text)
    assert "\nmore" in repr(responses)
    assert responses.text == f"said {odd}\nmore"  # for programs


def test_loading_shows_no_bar_and_leaves_the_setting(
    tiny_run: TinyRun, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "_tqdm_active", True)
    transformers.AutoModelForCausalLM.from_pretrained(tiny_run.target)
    assert "Loading weights" in capfd.readouterr().err  # the control
    assert fastadapt.load(tiny_run.folder, device="cpu").model is not None
    assert capfd.readouterr().err == ""
    assert logging.is_progress_bar_enabled()


def test_a_run_without_store_configuration_or_tokenizer_shows_itself(tiny_run: TinyRun) -> None:
    run = fastadapt.load(tiny_run.folder / "adapter", device="cpu")
    assert (run.store, run.config, run.commit) == (None, None, None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (Path(tiny_run.target) / name).unlink()
    for text in (repr(run), page(run).text):
        assert f"{L} × 12" in text
        assert tiny_run.target in text
        assert "not collected (fastadapt features collect" in text
    with pytest.raises(UserError, match="no features were collected from this run yet"):
        run.feature(0, 1)
    with pytest.raises(UserError, match="holds no tokenizer"):
        run.features("w5")


def test_an_intervention_is_a_run(tmp_path: Path) -> None:
    source = shutil.copytree(FINISHED, tmp_path / "run")
    folder = tmp_path / "bias"
    intervene(source, folder, no_features(source), Intervention("only"))
    run = fastadapt.load(folder, device="cpu")
    assert run.config is None
    assert not any(run.features("tom has 3 apples").fires)
    assert (
        fastadapt.load(source, device="cpu").features("tom has 3 apples").fires[-1]
    )  # the control
    assert run.generate("tom has 3 apples .", max_new_tokens=3)["adapter"].text


def test_a_baseline_has_kls_and_no_features(tiny_run: TinyRun) -> None:
    config = PairConfig(tiny_run.target, tiny_run.base, device="cpu")
    model = ReplacementModel.create(ModelPair.load(config), "bias")
    folder = tiny_run.folder.with_name("bias")
    names = {"target": tiny_run.target, "base": tiny_run.base}
    save_adapters(model.adapters, folder / "adapter", names)
    run = fastadapt.load(folder, device="cpu")
    shown = run.kl(IDS)
    assert shown["adapter"] == pytest.approx(shown["hybrid"], abs=1e-6)  # a new bias adds nothing
    for text in (repr(shown), page(shown).text):
        assert "KL of biases" in text
        assert "adapter" not in text
    responses = run.generate(IDS, models=["hybrid", "adapter"], max_new_tokens=1)
    assert "--- biases\n" in repr(responses)
    assert "biases" in page(responses).text
    assert "hybrid, a bias per layer" in page(run).text
    assert "none: this run trained no transcoders" in repr(run)
    with pytest.raises(UserError, match="this run trained no transcoders, so it has no features"):
        run.feature(0, 1)
    with pytest.raises(UserError, match="expected transcoders, got a baseline"):
        run.features(IDS)


def test_texts_that_cannot_be_read_are_refused(tiny_run: TinyRun) -> None:
    run = fastadapt.load(tiny_run.folder, device="cpu")
    ids: Any
    for ids, message in (
        ("", "prompt: expected a text, got none"),
        ([5] * 65, "at most 64 tokens, the model's context, got 65"),
        ([5, 40], "tokens below 40"),
        ([5, -1], "expected tokens of 0 or more, got token -1"),
        ([5, 10**30], "tokens below 40"),
        ([[5], [6]], r"expected a text or token ids \[T\], whole numbers, got \[\[5\], \[6\]\]"),
        (torch.tensor([[5], [6]]), r"whole numbers, got \[\[5\], \[6\]\]"),
        ([], r"whole numbers, got \[\]"),
        (None, "whole numbers, got None"),
        (["a", "b"], r"whole numbers, got \['a', 'b'\]"),
        ([1.9, 2.7], r"whole numbers, got \[1.9, 2.7\]"),
        (torch.tensor([1.9]), "whole numbers, got"),
        ({"input_ids": [5]}, "got a tokenizer's result; give its input_ids"),
    ):
        with pytest.raises(UserError, match=message):
            run.features(ids)
        with pytest.raises(UserError, match=message):
            run.kl(ids)
        if "context" not in message:
            with pytest.raises(UserError, match=message):
                run.generate(ids, plain=True, max_new_tokens=1)
    for ids in (torch.tensor([IDS]), np.array(IDS), [IDS], tuple(IDS)):
        assert run.kl(ids).trace.ids == IDS


def test_impossible_arguments_are_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Any = fastadapt.load(shutil.copytree(FINISHED, tmp_path / "run"), device="cpu")
    monkeypatch.setattr(ModelPair, "load", None)
    for layer, number_, message in (
        (0, "x", "feature: expected a whole number, got 'x'"),
        ("0", 7, "layer: expected a whole number, got '0'"),
        (0, 1.5, "feature: expected a whole number, got 1.5"),
        (0.0, 7, "layer: expected a whole number, got 0.0"),
    ):
        with pytest.raises(UserError, match=message):
            run.feature(layer, number_)
    assert repr(run.feature(np.int64(0), 7)) == repr(run.feature(0, 7))
    with pytest.raises(UserError, match=r"top: expected a whole number, got 2\.5"):
        run.features(IDS, top=2.5)
    with pytest.raises(UserError, match="examples: expected a whole number, got 'x'"):
        run.feature(0, 7, examples="x")
    for scale, message in (
        ({(2, 7): "x"}, r"scale of \(2, 7\): expected a finite number, got 'x'"),
        ({(2, 7): math.nan}, r"scale of \(2, 7\): expected a finite number, got nan"),
        ([(2, 7)], r"scale: expected factors by feature, .*, got \[\(2, 7\)\]"),
        ({(2,): 0.0}, r"scale: expected factors by feature, .*, got \(2,\)"),
        ({(2, 7.0): 0.0}, r"scale: expected .*, got \(2, 7.0\)"),
        ({2: 0.0}, r"scale: expected .*, got 2"),
    ):
        with pytest.raises(UserError, match=message):
            run.generate(IDS, scale=scale)
    with pytest.raises(UserError, match="no set 'few'"):
        run.generate(IDS, without="few")


@pytest.mark.parametrize("entry", ["weights", "configs", "versions"])
def test_a_card_with_a_list_in_place_of_names_is_refused(entry: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FINISHED / "adapter", tmp_path / "adapter"))
    card = json.loads((folder / CARD).read_text())
    card["metadata"][entry] = [1]
    (folder / CARD).write_text(json.dumps(card))
    with pytest.raises(UserError, match=rf"fastadapt.json: metadata.{entry}: .*object"):
        fastadapt.load(folder)


def test_both_names_are_one_function() -> None:
    assert fastadapt.load_run is fastadapt.load
