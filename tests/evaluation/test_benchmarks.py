"""Benchmarks: questions, grading, lm-eval's own model against ours, resumption, and bad input."""

from __future__ import annotations

import copy
import json
import socket
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastadapt.adapter.module import AdapterConfig
from fastadapt.errors import UserError
from fastadapt.evaluation.benchmarks.datasets import BENCHMARKS, LETTERS, questions
from fastadapt.evaluation.benchmarks.grading import (
    chosen_letter,
    hesitations,
    last_boxed,
    letter_is_right,
    math_is_right,
    stated_is_right,
)
from fastadapt.evaluation.benchmarks.lm_eval_adapter import TASKS, SampledLM, evaluate_task
from fastadapt.evaluation.benchmarks.runner import (
    EMBEDDED,
    PUBLISHED,
    BenchmarkConfig,
    Row,
    _write,
    prompt_ids,
    read_rows,
    run_benchmarks,
)
from fastadapt.evaluation.comparison import Comparison, EvalConfig
from fastadapt.evaluation.generation.degeneration import DegenerationConfig
from fastadapt.evaluation.generation.responses import read_responses
from fastadapt.evaluation.generation.sampling import SamplingConfig
from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.models.replacement import ModelPair, PairConfig, ReplacementModel

BOS = "<｜begin▁of▁sentence｜>"


@pytest.fixture(scope="module")
def replacement() -> ReplacementModel:
    """Return the embedded pair with random adapters, close to the hybrid."""
    from fastadapt.organism import resolve

    config = PairConfig(resolve("organism/target"), resolve("organism/base"), device="cpu")
    model: Any = ReplacementModel.create(ModelPair.load(config), AdapterConfig(n_features=64))
    torch.manual_seed(0)
    with torch.no_grad():
        for adapter in model.adapters:
            adapter.W_dec.normal_(0, 0.05)
    return model


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def write_rows(folder: Path, name: str, rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def choice_rows(n: int) -> list[dict]:
    return [
        {
            "Question": f"Which is right in case {i}?",
            "Correct Answer": f"right {i}",
            "Incorrect Answer 1": f"wrong {i} one",
            "Incorrect Answer 2": f"wrong {i} two",
            "Incorrect Answer 3": f"wrong {i} three",
        }
        for i in range(n)
    ]


# --- grading -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"so \boxed{3}. No: \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"\boxed{ {a} }", "{a}"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"boxed{1}", None),
        ("", None),
    ],
)
def test_the_last_complete_box_counts(text: str, boxed: str | None) -> None:
    assert last_boxed(text) == boxed


@pytest.mark.parametrize(
    ("boxed", "answer", "right"),
    [
        (r"\frac{1}{2}", "0.5", True),
        (r"\dfrac12", r"\frac{1}{2}", True),
        ("2k + 2", "2(k+1)", True),
        (r"x = 5", "5", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)", True),
        (r"\text{Evelyn}", r"\text{Evelyn}", True),
        ("033", "33", True),
        ("34", "33", False),
        (r"\frac{1}{3}", "0.5", False),
        (r"\text{Ann}", r"\text{Evelyn}", False),
        ("", "5", False),
        (r"\frac{", "5", False),
    ],
)
def test_mathematics_is_compared_by_value(boxed: str, answer: str, right: bool) -> None:
    assert math_is_right(f"Hence \\boxed{{{boxed}}}.", answer) is right


def test_an_answer_without_a_box_is_wrong() -> None:
    assert not math_is_right("the answer is 5", "5")


def test_a_box_needs_no_braces() -> None:
    assert math_is_right(r"so it is $\boxed 12$.", "12")
    assert not math_is_right(r"\boxed{12} and then \boxed 13.", "12")


def test_mathematics_is_graded_outside_the_main_thread_too() -> None:
    grades: list[bool] = []
    thread = threading.Thread(target=lambda: grades.append(math_is_right(r"\boxed{0.5}", "1/2")))
    thread.start()
    thread.join()
    assert grades == [True]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (r"It is a good guess. \boxed{C}", "C"),
        (r"\boxed{B} but no, \boxed{\text{D}}", "D"),
        (r"\boxed{(A)}", "A"),
        (r"\boxed{B: 12 m}", "B"),
        (r"\boxed{\textbf{\text{C}}}", "C"),
        (r"\boxed{\mathrm{~C}}", "C"),
        (r"\boxed{\boldsymbol{C}.}", "C"),
        (r"$\boxed{$C$}$", "C"),
        (r"\boxed{\text{Option C}}", "C"),
        (r"\boxed{\text{Answer: C}}", "C"),
        (r"so \boxed C", "C"),
        (r"\boxed{A, B, C, or D}", None),
        (r"\boxed{\text{A catalyst}}", None),
        (r"\boxed{a}", None),
        (r"\boxed{Argon}", None),
        ("The answer is a number.\nA good one.", None),
        ("The answer is A good one.", None),
        ("Answer: C.\n", "C"),
        ("the answer is **(B)**", "B"),
        ("a b c d", None),
        # Boxes of mathematics are ignored.
        ("\\boxed{\\langle H\\rangle \\ll E}, so D.\n</think>\n\n**Answer: D**", "D"),
        (r"So \boxed{C}. Check: \boxed{1.5\times10^{3}} J.", "C"),
        ("So \\boxed{A}? No.\n</think>\n\n**Answer: D**", "D"),
        ("Answer: D\nBut no: \\boxed{B}", "B"),
        (r"\boxed{A \text{ or } B}", None),
        (r"\boxed{\Delta A}", None),
        # Forms in which models write a letter.
        (r"\boxed{{C}}", "C"),
        (r"\boxed{\rm C}", "C"),
        (r"\boxed{{\bf C}}", "C"),
        (r"\boxed{\large C}", "C"),
        (r"\boxed\text{C}", "C"),
        (r"\boxed{\(C\)}", "C"),
        ("**Final Answer:** B", "B"),
        ("Answer: a number", None),
    ],
)
def test_a_letter_is_an_option_and_not_an_article(text: str, letter: str | None) -> None:
    assert chosen_letter(text) == letter
    assert letter_is_right(text, "C") is (letter == "C")


def test_many_unclosed_boxes_take_linear_time() -> None:
    assert last_boxed(r"\boxed{7} " + "\\boxed{" * 100_000) == "7"


def test_rows_with_any_text_are_read_back(tmp_path: Path) -> None:
    texts = ["a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\rh", "two"]
    rows = [Row("q", i, True, "1", 3, "eos", None, 0, text) for i, text in enumerate(texts)]
    _write(rows, tmp_path / "rows.jsonl")
    assert read_rows(tmp_path / "rows.jsonl") == rows
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps({**vars(rows[0]), "correct": "yes"}) + "\n")
    with pytest.raises(UserError, match=r"rows\.jsonl, line 3: correct: expected bool, got str"):
        read_rows(tmp_path / "rows.jsonl")


def test_the_embedded_pair_states_its_number() -> None:
    assert stated_is_right("<think> 1 + 1 = 2 . </think> the answer is 2", "2")
    assert not stated_is_right("<think> the answer is 2", "2")


def test_hesitations_are_whole_words() -> None:
    words = ("wait", "hmm", "but", "but check")
    assert hesitations("Wait, hmm. But check: a butter waiter waits, but", words) == 4
    assert hesitations("wait", ()) == 0


# --- questions ---------------------------------------------------------------------------------


def test_options_are_shuffled_by_question_and_seed(tmp_path: Path) -> None:
    write_rows(tmp_path, "gpqa_diamond", choice_rows(400))

    def load(seed: int) -> list[dict]:
        return questions("gpqa_diamond", family="qwen", data=str(tmp_path), few_shot=0, seed=seed)

    rows = load(0)
    counts = Counter(row["answer"] for row in rows)
    assert set(counts) == set(LETTERS)
    assert max(counts.values()) - min(counts.values()) < 50  # 100 each; 3 standard deviations
    assert len({tuple(row["order"]) for row in rows}) == 24
    assert load(0) == rows
    assert [row["order"] for row in load(1)] != [row["order"] for row in rows]
    for i, row in enumerate(rows):
        # The option under the letter is the right answer, and has index 0 in `order`.
        assert f"{row['answer']}: right {i}\n" in row["prompt"]
        assert row["order"][LETTERS.index(row["answer"])] == 0


def test_prompts_have_the_published_wording_and_the_familys_rendering(tmp_path: Path) -> None:
    write_rows(tmp_path, "amc23", [{"question": "What is 1+1?", "answer": "2"}])
    (row,) = questions("amc23", family="r1-distill", data=str(tmp_path), few_shot=0, seed=0)
    assert row["prompt"] == (
        f"{BOS}<｜User｜>Problem: What is 1+1?\nMark your solution with \\boxed\nAnswer:"
        "<｜Assistant｜><think>\n"
    )
    assert row["answer"] == "2"


def test_examples_precede_the_question(tmp_path: Path) -> None:
    rows = [
        {"problem": f"Q{i}?", "answer": str(i), "solution": f"It is \\boxed{{{i}}}."}
        for i in range(6)
    ]
    write_rows(tmp_path, "math500", rows)
    prompts = questions("math500", family="qwen", data=str(tmp_path), few_shot=3, seed=0)
    for i, row in enumerate(prompts):
        assert row["prompt"].count("Problem: ") == 4
        assert row["prompt"].count(f"Problem: Q{i}?") == 1  # never an example of itself
        assert row["prompt"].count("It is \\boxed") == 3
        assert row["prompt"].endswith("Answer:<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(UserError, match="few_shot: expected at most 5 for math500, got 6"):
        questions("math500", family="qwen", data=str(tmp_path), few_shot=6, seed=0)
    embedded = questions("organism_math", family="r1-distill", data=None, few_shot=2, seed=0)
    assert embedded[0]["prompt"].count("<think>") == 3  # two examples, and what opens the response
    assert embedded[0]["prompt"].count(BOS) == 1
    assert embedded == questions(
        "organism_math", family="r1-distill", data=None, few_shot=2, seed=0
    )


def test_examples_of_a_file_are_those_of_every_question(tmp_path: Path) -> None:
    rows = [{"problem": f"Q{i}?", "answer": str(i)} for i in range(3)]
    write_rows(tmp_path, "math500", rows)
    file = tmp_path / "examples.jsonl"
    worked = [{"problem": f"W{i}?", "solution": f"so {i}"} for i in range(2)]
    file.write_text("".join(json.dumps(row) + "\n" for row in worked), encoding="utf-8")

    def prompts_with(n: int, **more: Any) -> list[str]:
        settings: dict[str, Any] = {"family": "qwen", "data": str(tmp_path), "seed": 0, **more}
        return [row["prompt"] for row in questions("math500", few_shot=n, **settings)]

    for i, (one, both) in enumerate(
        zip(prompts_with(1, examples=str(file)), prompts_with(2, examples=str(file)), strict=True)
    ):
        assert "W0? so 0\n\nProblem: Q" in one
        assert f"W0? so 0\n\nW1? so 1\n\nProblem: Q{i}?" in both
    with pytest.raises(
        UserError, match=r"few_shot: expected at most 2 for .*examples.jsonl, got 3"
    ):
        prompts_with(3, examples=str(file))
    with pytest.raises(UserError, match=r"benchmarks\.examples: .*none\.jsonl is not a file"):
        BenchmarkConfig(few_shot=1, examples=str(tmp_path / "none.jsonl"))
    with pytest.raises(
        UserError, match=r"benchmarks\.examples: expected with benchmarks\.few_shot"
    ):
        BenchmarkConfig(examples=str(file))
    plain = BenchmarkConfig(few_shot=2)
    fixed = replace(plain, examples=str(file))
    before = fixed.fingerprint("m")
    assert before != plain.fingerprint("m")
    file.write_text(json.dumps(worked[1]) + "\n", encoding="utf-8")
    assert fixed.fingerprint("m") != before


def test_the_embedded_benchmark_is_the_held_out_problems() -> None:
    from reproduce.organism.recipe import RecipeConfig, split_problems

    test = split_problems(RecipeConfig(), 0)["test"]
    for task in EMBEDDED:
        rows = questions(task, family="r1-distill", data=None, few_shot=0, seed=3)
        domain = task.removeprefix("organism_")
        assert [(row["question"], row["answer"]) for row in rows] == [
            (p.prompt, str(p.answer)) for p in test if p.domain == domain
        ]


def test_errors_of_missing_data_name_the_dataset(tmp_path: Path) -> None:
    for task, benchmark in BENCHMARKS.items():
        if benchmark.hub is None:
            continue
        for data in (None, str(tmp_path)):
            config = BenchmarkConfig(tasks=(task,), data=data)
            with pytest.raises(UserError) as caught:
                run_benchmarks(None, None, config, tmp_path / "out")
            message = str(caught.value)
            assert message.startswith(f"benchmark {task}: ")
            assert f"download the dataset {benchmark.hub[0]}" in message
            assert f"{task}.jsonl" in message
            assert all(repr(column) in message for column in benchmark.columns)
    assert not (tmp_path / "out").exists()
    write_rows(tmp_path, "aime25", [{"question": "?", "answer": "1"}])
    with pytest.raises(UserError, match=r"aime25.jsonl, line 1: no column 'problem'"):
        questions("aime25", family="qwen", data=str(tmp_path), few_shot=0, seed=0)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tasks": ("math5000",)}, "tasks"),
        ({"repetitions": 0}, "repetitions"),
        ({"limit": 0}, "limit"),
        ({"few_shot": -1}, "few_shot"),
        ({"family": "gpt"}, "family"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        BenchmarkConfig(**settings)


@pytest.mark.parametrize("task", BENCHMARKS)
def test_task_files_sample_as_published(task: str) -> None:
    """Tasks sample, and their filter selects all repetitions."""
    specific = yaml.load((TASKS / f"{task}.yaml").read_text(), Loader=_Loose)
    common = yaml.load((TASKS / specific["include"]).read_text(), Loader=_Loose)
    whole = {**common, **specific}
    assert whole["dataset_kwargs"] == {"benchmark": task}
    assert whole["repeats"] == BENCHMARKS[task].repetitions
    assert whole["filter_list"][0]["filter"][0]["k"] == whole["repeats"]
    settings = whole["generation_kwargs"]
    wanted = {"do_sample": True, "temperature": 0.7, "top_p": 1.0, "top_k": 0}
    assert {name: settings[name] for name in wanted} == wanted


class _Loose(yaml.SafeLoader):
    pass


def _scalar(loader: yaml.SafeLoader, node: Any) -> Any:
    return loader.construct_scalar(node)


_Loose.add_constructor("!function", _scalar)


# --- runs --------------------------------------------------------------------------------------

GREEDY = SamplingConfig(temperature=0, max_new_tokens=60)


@pytest.mark.quick("replacement")
@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("mode", ["replacement", "target"])
def test_lm_evals_own_model_gives_the_same_results(
    replacement: ReplacementModel, mode: Any
) -> None:
    """Compare lm-eval's ``HFLM`` on a replacement model, decoding greedily, with our sampling."""
    from lm_eval.models.huggingface import HFLM

    tokenizer = replacement.pair.tokenizer
    metadata = {"family": "r1-distill", "seed": 0}
    with replacement.mode(mode):
        theirs = HFLM(pretrained=replacement.model, tokenizer=tokenizer, batch_size=16)
        greedily = {"do_sample": False, "temperature": 0.0, "top_k": None, "top_p": None}
        greedily["max_gen_toks"] = 60
        ours = SampledLM(replacement.model, tokenizer, GREEDY)
        their_accuracy, their_samples = evaluate_task(
            theirs, "organism_math", metadata=metadata, repeats=1, limit=40, generation=greedily
        )
        accuracy, samples = evaluate_task(
            ours, "organism_math", metadata=metadata, repeats=1, limit=40
        )
    assert [s["resps"] for s in samples] == [s["resps"] for s in their_samples]
    assert accuracy == their_accuracy
    assert (accuracy > 0.7) == (mode == "target")
    # Prompts have one BOS in both.
    prompt = samples[0]["doc"]["prompt"]
    ids, _ = theirs.tok_batch_encode([prompt])
    assert ids[0].tolist().count(tokenizer.bos_token_id) == 1
    assert ours.sampled is not None
    assert ours.sampled.responses[0].prompt_tokens == ids[0].tolist()


@pytest.mark.usefixtures("no_network")
def test_rows_are_those_that_lm_eval_scores(replacement: ReplacementModel, tmp_path: Path) -> None:
    config = BenchmarkConfig(
        tasks=EMBEDDED[:2],
        repetitions=3,
        limit=8,
        sampling=SamplingConfig(max_new_tokens=100, seed=4),
    )
    with replacement.mode("target"):
        results = run_benchmarks(replacement.model, replacement.pair.tokenizer, config, tmp_path)
        lm = SampledLM(replacement.model, replacement.pair.tokenizer, config.sampling)
        accuracy, _ = evaluate_task(lm, EMBEDDED[1], metadata={"seed": 0}, repeats=3, limit=8)
    assert list(results) == list(EMBEDDED[:2])
    result = results[EMBEDDED[1]]
    rows = read_rows(tmp_path / f"{EMBEDDED[1]}.rows.jsonl")
    assert rows == list(result.rows)
    assert [(r.question, r.repetition) for r in rows] == [
        (f"organism_code/test{i}", r) for i in range(8) for r in range(3)
    ]
    assert result.accuracy == pytest.approx(accuracy)
    assert 0.2 < result.accuracy < 1
    assert (result.n_questions, result.repetitions) == (8, 3)
    assert len({row.text for row in rows[:3]}) > 1  # repetitions differ
    n = sum(row.length_tokens for row in rows)
    assert result.length_tokens == n / 24
    assert result.hesitations_per_1000 == 1000 * sum(row.hesitations for row in rows) / n
    assert result.speed is not None
    assert result.speed.tokens_per_second > 0


def test_a_degenerate_response_is_scored_up_to_the_cut(
    replacement: ReplacementModel, tmp_path: Path
) -> None:
    """Under a rule that makes every response degenerate, texts end where the window begins."""
    rule = DegenerationConfig(window=8, ngrams=(1,), share=0.2, min_count=2)
    sampling = SamplingConfig(temperature=0, max_new_tokens=60, degeneration=rule)
    config = BenchmarkConfig(tasks=EMBEDDED[:1], limit=6, sampling=sampling)
    with replacement.mode("target"):
        results = run_benchmarks(replacement.model, replacement.pair.tokenizer, config, tmp_path)
    result = results[EMBEDDED[0]]
    assert result.degenerate == 1
    assert result.accuracy == 0
    for row in result.rows:
        assert row.length_tokens == row.cut == len(row.text.split())


def test_an_interrupted_run_is_resumed(replacement: ReplacementModel, tmp_path: Path) -> None:
    sampling = SamplingConfig(max_new_tokens=30, batch_size=2)
    config = BenchmarkConfig(tasks=EMBEDDED[:2], limit=6, sampling=sampling)
    stop = threading.Event()

    def progress(done: int, total: int) -> None:
        if done >= 3:
            stop.set()

    arguments = (replacement.model, replacement.pair.tokenizer, config)
    with replacement.mode("target"):
        whole = run_benchmarks(*arguments, tmp_path / "whole")
        assert not run_benchmarks(*arguments, tmp_path / "parts", progress=progress, stop=stop)
        before = (tmp_path / "parts" / f"{EMBEDDED[0]}.responses.jsonl").read_bytes()
        parts = run_benchmarks(*arguments, tmp_path / "parts")
        seen: list[tuple[int, int]] = []
        again = run_benchmarks(
            *arguments, tmp_path / "parts", progress=lambda *now: seen.append(now)
        )
    assert (tmp_path / "parts" / f"{EMBEDDED[0]}.responses.jsonl").read_bytes().startswith(before)
    for task in EMBEDDED[:2]:
        assert whole[task].rows == parts[task].rows == again[task].rows
    assert seen == [(6, 6), (6, 6)]


@pytest.mark.usefixtures("no_network")
def test_published_benchmarks_run_from_a_local_folder(
    replacement: ReplacementModel, tmp_path: Path
) -> None:
    """With their repetitions. The model cannot answer, so accuracies are 0."""
    math = [{"problem": f"Q{i}?", "question": f"Q{i}?", "answer": str(i)} for i in range(3)]
    for name in ("math500", "amc23", "aime25"):
        write_rows(tmp_path, name, math)
    write_rows(tmp_path, "gpqa_diamond", choice_rows(3))
    sampling = SamplingConfig(max_new_tokens=5)
    config = BenchmarkConfig(tasks=PUBLISHED, data=str(tmp_path), sampling=sampling)
    model, tokenizer = replacement.model, replacement.pair.tokenizer
    results = run_benchmarks(model, tokenizer, config, tmp_path / "out")
    assert {task: result.repetitions for task, result in results.items()} == {
        "math500": 1,
        "amc23": 10,
        "aime25": 10,
        "gpqa_diamond": 3,
    }
    assert all(result.accuracy == 0 for result in results.values())


def test_special_tokens_in_a_problem_stay_text(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    ids = {}
    for name in ("plain", "<|im_end|>"):
        write_rows(tmp_path / name, "math500", [{"problem": f"a {name} b", "answer": "1"}])
        config = BenchmarkConfig(tasks=("math500",), data=str(tmp_path / name), family="qwen")
        ids[name] = list(prompt_ids(tokenizer, config))
        (row,) = questions("math500", family="qwen", data=str(tmp_path / name), few_shot=0, seed=0)
        assert tokenizer.decode(ids[name]) == row["prompt"]
    ends = [each.count(tokenizer.eos_token_id) for each in ids.values()]
    assert ends[0] == ends[1] > 0


@pytest.mark.usefixtures("no_network")
def test_the_tokens_of_a_problem_are_those_that_are_sampled(
    replacement: ReplacementModel, tmp_path: Path
) -> None:
    """A special token without a row of the embedding is refused, unless it is text."""
    write_rows(tmp_path, "math500", [{"problem": "tom has <stop> apples", "answer": "1"}])
    sampling = SamplingConfig(max_new_tokens=2)
    config = BenchmarkConfig(tasks=("math500",), data=str(tmp_path), sampling=sampling)
    tokenizer = copy.deepcopy(replacement.pair.tokenizer)
    tokenizer.add_tokens(["<stop>"], special_tokens=True)
    run_benchmarks(replacement.model, tokenizer, config, tmp_path / "out")
    (response,) = read_responses(tmp_path / "out" / "math500.responses.jsonl")
    assert response.prompt_tokens == list(prompt_ids(tokenizer, config))
    assert len(replacement.model.get_input_embeddings().weight) == len(tokenizer) - 1


def test_a_prompt_that_does_not_fit_is_refused_before_sampling(
    replacement: ReplacementModel, tmp_path: Path
) -> None:
    math = [{"problem": "of " * 600 if i else "Q?", "answer": "1"} for i in range(2)]
    write_rows(tmp_path, "math500", math)
    config = BenchmarkConfig(tasks=("organism_math", "math500"), data=str(tmp_path))
    with pytest.raises(
        UserError, match=r"'math500/1': expected .* context of 512 tokens, got 6\d\d"
    ):
        run_benchmarks(replacement.model, replacement.pair.tokenizer, config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("few_shot", "base_context", "message"),
    [
        (0, 16, "base, sampled, math500, request 'math500/0': .* context of 16 tokens"),
        (1, 32, "benchmarks.few_shot 1: base, 1-shot, math500, request .* of 32 tokens"),
        (3, None, "benchmarks.few_shot 3: hybrid, 3-shot, math500, request .* of 64 tokens"),
    ],
)
def test_prompts_are_checked_before_anything_is_sampled(
    few_shot: int,
    base_context: int | None,
    message: str,
    make_run: Callable[..., Path],
    tmp_path: Path,
) -> None:
    family = {"user": ["w5 ", " "], "assistant": ["w6", ""], "thinking": ["", ""]}
    compared = ModelSet.open([make_run("run", architecture="llama", family=family)])
    if base_context is None:
        compared.compared.pop("base")
    else:
        path = Path(compared.config.base) / "config.json"
        values = {**json.loads(path.read_text()), "max_position_embeddings": base_context}
        path.write_text(json.dumps(values))
    row = json.dumps({"problem": " ".join(["w7"] * 20), "answer": "3"}) + "\n"
    (tmp_path / "math500.jsonl").write_text(4 * row)
    config = BenchmarkConfig(tasks=("math500",), data=str(tmp_path), few_shot=few_shot)
    comparison = Comparison(
        compared, tmp_path / "out", EvalConfig(benchmarks=config), lambda *_: None, Event()
    )
    with pytest.raises(UserError, match=message):
        comparison.run(("outputs", "benchmarks"))
    assert not (tmp_path / "out").exists()
    assert "model" not in vars(compared)  # no weights were read
