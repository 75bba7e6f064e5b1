"""A mistake in the options or the file gives one clear error with its own message and exit code.

A case has a name, a function that prepares the command (with a desk, see conftest), and a pattern
of the error message.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml


def option(name: str, value: Any, message: str) -> tuple[str, Callable[[Any], list[object]], str]:
    return (f"{name} {value}", lambda d: d.train(name, value), message)


CASES = [
    # --- the command line
    ("command", lambda d: ["trian"], r"unknown command 'trian'; did you mean train\?"),
    ("no config", lambda d: ["train"], r"PRESET_OR_YAML is missing; presets: gated, organism"),
    (
        "preset",
        lambda d: ["train", "organsim"],
        r"organsim: no such preset; did you mean organism\? Known: gated, organism, qwq-",
    ),
    (
        "no preset",
        lambda d: ["train", "zzz"],
        r"zzz: no such preset\. Known: gated, organism, qw",
    ),
    (
        "a folder",
        lambda d: ["train", d.folder],
        r"is a folder; expected a YAML file or a preset \(gated, organism, qwq-",
    ),
    (
        "second preset",
        lambda d: d.train("quux"),
        r"quux: no such preset\. Known: gated, organism.*; overlays: best, bias, dense",
    ),
    (
        "nearest overlay",
        lambda d: d.train("skylin"),
        r"skylin: no such preset; did you mean skyline\?",
    ),
    (
        "an overlay alone",
        lambda d: ["train", "no-bridge"],
        r"no-bridge is an overlay; give a preset or file.*: fastadapt train gated no-bridge",
    ),
    (
        "a preset after an option",
        lambda d: d.train("--optimizer.lr", 1, "skyline"),
        r"unexpected argument 'skyline'",
    ),
    (
        "an overlay that is no mapping",
        lambda d: d.train(d.over("objective: 3\n")),
        r"over\.yaml: objective: expected a mapping, got 3",
    ),
    (
        "unknown key of an overlay",
        lambda d: d.train(d.over("objective: {sparsty: 1}\n")),
        r"unknown key objective\.sparsty; did you mean objective\.sparsity\?",
    ),
    option("--optimizer.learning_rate", "1", r"unknown option --optimizer\.learning_rate"),
    option("--optimizer.lrr", "1", r"--optimizer\.lrr; did you mean --optimizer\.lr\?"),
    ("abbreviation", lambda d: d.train("--res"), r"unknown option --res; did you mean --resume\?"),
    ("no value", lambda d: d.train("--optimizer.lr"), r"--optimizer\.lr: expected one argument"),
    option("--optimizer.lr", "fast", r"--optimizer\.lr: expected float, got 'fast'"),
    option("--data.max_tokens", "10.5", r"--data\.max_tokens: expected int, got '10\.5'"),
    option("--adapter.k", "few", r"--adapter\.k: expected float or null, got 'few'"),
    option("--optimizer.betas", "[0.9]", r"--optimizer\.betas: expected a tuple with 2 elements"),
    option(
        "--objective.checkpoint",
        "maybe",
        r"objective\.checkpoint must be auto or one of none, mlp, attention, full, got 'maybe'",
    ),
    (
        "both",
        lambda d: d.train("--resume", "--overwrite"),
        r"--resume .* --overwrite .*choose one",
    ),
    (
        "command of a group",
        lambda d: ["features", "colect"],
        r"unknown command 'features colect'; did you mean collect\?",
    ),
    # --- the file
    ("no file", lambda d: ["train", d.folder / "no.yaml"], r"no\.yaml: no such file"),
    (
        "no YAML",
        lambda d: d.yaml(lambda v: "pair: [unclosed"),
        r"run\.yaml is not valid YAML: .*line 1",
    ),
    ("a list", lambda d: d.yaml(lambda v: "- pair\n"), r"expected object, got array"),
    ("empty file", lambda d: d.yaml(lambda v: ""), r"expected object, got null"),
    (
        "component twice",
        lambda d: d.yaml(lambda v: yaml.safe_dump(v) + "optimizer:\n  lr: 0.1\n"),
        r"run\.yaml is not valid YAML: the key 'optimizer' occurs twice at line \d+",
    ),
    (
        "key twice, typed",
        lambda d: d.train("--optimizer", "{lr: 1, lr: 2}"),
        r"the key 'lr' occurs twice",
    ),
    (
        "deep, typed",
        lambda d: d.train("--optimizer", "[" * 100_000),
        r"nested more than 64 levels deep",
    ),
    (
        "unknown key",
        lambda d: d.yaml(lambda v: v["run"].update(sed=1)),
        r"unknown key run\.sed; did you mean run\.seed\?",
    ),
    (
        "unknown part",
        lambda d: d.yaml(lambda v: v.update(optimiser={})),
        r"unknown key optimiser; did you mean optimizer\?",
    ),
    (
        "missing key",
        lambda d: d.yaml(lambda v: v.update(pair={"target": str(d.pair / "target")})),
        r"pair\.base is missing",
    ),
    (
        "part is no mapping",
        lambda d: d.yaml(lambda v: v.update(adapter=3)),
        r"adapter: expected a mapping, got 3",
    ),
    (
        "type in the file",
        lambda d: d.yaml(lambda v: v["run"].update(seed="x")),
        r"run\.seed: expected int, got 'x'",
    ),
    # --- impossible values
    option("--optimizer.lr", "-1", r"optimizer\.lr: expected a positive, finite number, got -1\.0"),
    option(
        "--optimizer.betas", "[0.9, 1.5]", r"optimizer\.betas: expected two numbers in \[0, 1\)"
    ),
    option("--optimizer.warmup", "2", r"optimizer\.warmup: .*\[0, 1\], got 2\.0"),
    option("--optimizer.batch_size", "0", r"optimizer\.batch_size: expected 1 or more, got 0"),
    option("--run.keep_checkpoints", "0", r"run\.keep_checkpoints: expected 1 or more, got 0"),
    option("--adapter.n_features", "0", r"adapter\.n_features .*at least 1, got 0"),
    option("--adapter.activation", "gelu", r"adapter\.activation .*relu.*jumprelu.*got 'gelu'"),
    option("--adapter.activation", "topk", r"adapter\.k is needed with activation='topk'"),
    option("--adapter.k", "3", r"adapter\.k is not used with activation='relu'"),
    option(
        "--adapter.activation",
        "jumprelu",
        r"adapter\.bandwidth is needed with activation='jumprelu'",
    ),
    (
        "k > F",
        lambda d: d.train("--adapter.activation", "topk", "--adapter.k", 25),
        r"adapter\.k .*24.*got 25",
    ),
    option("--adapter.kind", "dora", r"adapter\.kind .*transcoder, mlp, norms, bias, lora, got"),
    option("--run.trains", "dora", r"run\.trains: expected one of .*'lora', got 'dora'"),
    option("--run.rank", "4", r"run\.trains: expected lora, since only low-rank.*'transcoder'"),
    option(
        "--adapter.kind",
        "mlp",
        r"n_features is a setting of transcoders.*'mlp': expected None, got 24",
    ),
    (
        "activation of norms",
        lambda d: d.train("norms", "--adapter.activation", "topk"),
        r"adapter\.activation is a setting of transcoders.*'norms': expected relu, got 'topk'",
    ),
    (
        "sparsity of an MLP",
        lambda d: d.train("skyline", "--objective.sparsity", "1e-3"),
        r"objective\.sparsity: expected 0, since run\.trains 'mlp' has no features.*got 0\.001",
    ),
    option("--adapter.implementation", "cuda", r"implementation .*'cuda'"),
    option("--objective.sparsity", "-0.001", r"objective\.sparsity .*got -0\.001"),
    option("--objective.first_cutoff", "2", r"objective\.first_cutoff .* must be 0 or 1, got 2"),
    option("--data.max_tokens", "1", r"data\.max_tokens: expected at least 2, got 1"),
    option("--data.family", "llama", r"family.*'llama'"),
    option("--pair.dtype", "float8", r"pair\.dtype must be one of float32.*got 'float8'"),
    option(
        "--pair.dtype",
        "float16",
        r"pair\.dtype: expected bfloat16, float32 or float64 for training, got float16, in which "
        r"the gradients of long texts round to 0",
    ),
    option("--pair.device", "abacus", r"pair\.device: .*'abacus'"),
    option(
        "--pair.attention", "telepathy", r"""attn_implementation="telepathy"` is not supported"""
    ),
]


@pytest.mark.parametrize("case", CASES, ids=[case[0].replace(" ", "-") for case in CASES])
def test_a_mistake_gets_one_clear_error(
    case: tuple[Any, ...], expect_error: Callable[..., None]
) -> None:
    _, arrange, *expected = case
    expect_error(arrange, *expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_without_a_gpu(
    expect_error: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastadapt.adapter.module.runs_triton", lambda device: False)
    _, arrange, message = option(
        "--adapter.implementation",
        "triton",
        "'triton' needs a GPU, and the device is cpu; use 'auto'",
    )
    expect_error(arrange, message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_interpreted_in_bfloat16(expect_error: Callable[..., None]) -> None:
    expect_error(
        lambda d: d.train("--adapter.implementation", "triton", "--pair.dtype", "bfloat16"),
        "'triton' is interpreted on a CPU, where Triton multiplies bfloat16 wrongly",
    )


def test_every_case_has_words_of_its_own(emitted: dict[str, str]) -> None:
    """The messages of all cases that have run so far are different."""
    assert len({name for name, *_ in CASES}) == len(CASES) >= 30
    by_message: dict[str, list[str]] = {}
    for case, said in emitted.items():
        by_message.setdefault(said, []).append(case)
    assert {said: cases for said, cases in by_message.items() if len(cases) > 1} == {}


def test_a_missing_extra_is_named(
    fastadapt: Callable[..., Any], recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.utils

    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: False)
    outcome = fastadapt("train", recipe(), "--pair.attention", "flash_attention_2")
    assert outcome.code == 2
    assert "pip install 'fastadapt[flash]'" in outcome.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(
    fastadapt: Callable[..., Any], recipe: Callable[..., Path]
) -> None:
    outcome = fastadapt("train", recipe(), "--pair.device", "cuda")
    assert outcome.code == 2
    assert re.search(r"pair\.device is cuda, but torch finds no GPU", outcome.err)
