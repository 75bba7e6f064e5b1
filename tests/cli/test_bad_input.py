"""An unusable model pair, data set or folder gives one clear error before any file is written.

A case has a name, a function that prepares the command (with a desk, see conftest), a pattern of
the error message, and the exit code if it is not 2.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

TURNS = [{"from": "user", "value": "w1 w2"}, {"from": "assistant", "value": "w3 w4"}]
CONVERSATION = {"conversations": TURNS}


def _equal_mlps(d: Any) -> list[object]:
    """The target differs from its base in attention only."""
    from safetensors.torch import load_file, save_file

    copy = d.folder / "copy"
    shutil.copytree(d.model("target"), copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return d.train(**{"pair.base": str(copy)})


def _without(d: Any, pattern: str) -> Path:
    target: Path = d.model("target")
    for path in target.glob(pattern):
        path.unlink()
    return target


def _no_tokenizer(d: Any) -> list[object]:
    return d.train(**{"pair.target": str(_without(d, "*token*"))})


def _pickled_weights(d: Any) -> list[object]:
    target = _without(d, "*.safetensors")
    torch.save({}, target / "pytorch_model.bin")
    return d.train(**{"pair.target": str(target)})


def _gguf_weights(d: Any) -> list[object]:
    target = _without(d, "*")
    (target / "model.Q4_1.gguf").write_bytes(b"GGUF")
    return d.train(**{"pair.target": str(target)})


def _weights_cut(d: Any, keep: float) -> list[object]:
    path = d.model("target") / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return d.train(**{"pair.target": str(path.parent)})


def _weights(d: Any, which: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> list[object]:
    from safetensors.torch import load_file, save_file

    path = d.model(which) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return d.train(**{f"pair.{which}": str(path.parent)})


def _other(d: Any, **config: Any) -> list[object]:
    return d.train(**{"pair.base": str(d.model("base", **config))})


def _no_config(d: Any) -> list[object]:
    base = d.model("base")
    (base / "config.json").unlink()
    return d.train(**{"pair.base": str(base)})


def _rows(*rows: Any, **changes: Any) -> Callable[[Any], list[object]]:
    return lambda d: d.train(**{"data.train": d.data(*rows), **changes})


def _file_in_place_of_folder(d: Any) -> list[object]:
    (d.folder / "run").write_text("not a folder")
    return d.train()


def _folder_of_something_else(d: Any) -> list[object]:
    (d.folder / "run").mkdir()
    (d.folder / "run" / "thesis.tex").write_text("years of work")
    return d.train("--overwrite")


def _second_run(d: Any) -> list[object]:
    d.finished_run()
    return d.train()


def _resume_another(d: Any) -> list[object]:
    d.finished_run()
    return d.train("--resume", "--optimizer.lr", "2e-3")


def _all_checkpoints_damaged(d: Any) -> list[object]:
    for path in (d.finished_run() / "checkpoints").glob("step-*/*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    return d.train("--resume")


def _checkpoint_of_another_shape(d: Any) -> list[object]:
    run = d.finished_run(**{"adapter.n_features": 16})
    moved = d.folder / "kept"
    shutil.move(run / "checkpoints", moved)
    shutil.rmtree(run)
    run = d.finished_run()
    shutil.rmtree(run / "checkpoints")
    shutil.move(moved, run / "checkpoints")
    return d.train("--resume")


CASES: list[tuple[Any, ...]] = [
    # --- the pair
    (
        "architecture",
        lambda d: _other(d, model_type="llama"),
        r"not a pair: .*model_type: target 'qwen2', base 'llama'",
    ),
    (
        "width",
        lambda d: _other(d, hidden_size=48),
        r"not a pair: .*hidden_size: target 32, base 48",
    ),
    (
        "inner width",
        lambda d: _other(d, intermediate_size=96),
        r"intermediate_size: target 64, base 96",
    ),
    (
        "layers",
        lambda d: _other(d, num_hidden_layers=3, layer_types=["full_attention"] * 3),
        r"not a pair: .*num_hidden_layers: target 2, base 3",
    ),
    (
        "activation function",
        lambda d: _other(d, hidden_act="gelu"),
        r"not a pair: .*hidden_act: target 'silu', base 'gelu'",
    ),
    (
        "target as base",
        lambda d: d.train(**{"pair.base": str(d.pair / "target")}),
        r"pair\.target and pair\.base are both .*no difference",
    ),
    (
        "equal MLPs",
        _equal_mlps,
        r"the MLPs of target .*target and base .*copy are equal, bit for bit",
    ),
    (
        "no tokenizer",
        _no_tokenizer,
        r"target holds no tokenizer .*--pair\.tokenizer",
    ),
    (
        "pickled weights",
        _pickled_weights,
        r"pytorch_model\.bin holds pickled weights",
    ),
    (
        "GGUF weights",
        _gguf_weights,
        r"model\.Q4_1\.gguf has GGUF weights",
    ),
    (
        "no model",
        lambda d: d.train(**{"pair.target": str(d.folder / "nothing")}),
        r"model .*nothing' cannot be loaded: no such folder",
    ),
    ("no config.json", _no_config, r"other-base.*config\.json"),
    (
        "cut weights",
        lambda d: _weights_cut(d, 0.7),
        r"other-target.*(truncated|cut|incomplete|damaged|cannot be read)",
    ),
    (
        "header cut",
        lambda d: _weights_cut(d, 0.001),
        r"other-target.*(header|truncated|cut|damaged|cannot be read)",
    ),
    (
        "weight missing",
        lambda d: _weights(d, "target", lambda t: t.pop("model.norm.weight")),
        r"other-target.*model\.norm\.weight",
    ),
    (
        "base MLP missing",
        lambda d: _weights(d, "base", lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        r"other-base.*model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    (
        "base MLP misshapen",
        lambda d: _weights(
            d,
            "base",
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(64, 31)}),
        ),
        r"other-base.*model\.layers\.0\.mlp\.up_proj\.weight",
    ),
    (
        "part of the embedded pair",
        lambda d: d.train(**{"pair.target": "organism/tarket"}),
        r"organism/tarket",
    ),
    # --- the data
    ("no data", lambda d: d.train(**{"data.train": str(d.folder / "no.jsonl")}), r"no\.jsonl"),
    ("kind of file", lambda d: d.train(**{"data.train": str(d.recipe())}), r"run\.yaml.*jsonl"),
    ("no column", _rows({"title": "w1"}), r"rows\.jsonl: no column 'conversations'.*'title'"),
    (
        "two plausible columns",
        _rows({**CONVERSATION, "text": "w1 w2"}),
        r"several columns may hold .*set data\.columns .*--columns\) to conversations or text",
    ),
    (
        "a template that fails",
        lambda d: d.train(**{"data.family": {"template": "{{ raise_exception('no chats') }}"}}),
        r"train\.jsonl, line 1: the chat template fails for turns of roles .*: no chats",
    ),
    (
        "a weight of 0",
        lambda d: d.train(**{"data.train": [{"source": d.data(CONVERSATION), "weight": 0}]}),
        r"data\.train: weight of .*rows\.jsonl': expected a finite number above 0, got 0;",
    ),
    ("no JSON", _rows(CONVERSATION, "{broken"), r"rows\.jsonl, line 2: .*JSON"),
    ("no rows", _rows(), r"rows\.jsonl.*(empty|got none)"),
    (
        "one turn",
        _rows({"conversations": TURNS[:1]}),
        r"rows\.jsonl, line 1: conversations: expected a turn of the assistant, got none",
    ),
    (
        "empty sample",
        _rows(CONVERSATION, {"conversations": [TURNS[0], {"from": "assistant", "value": ""}]}),
        r"rows\.jsonl, line 2: conversations, turn 2.*is empty",
    ),
    ("all too long", _rows(CONVERSATION, **{"data.max_tokens": 3}), r"max_tokens"),
    ("markers", lambda d: d.train(**{"data.family": "qwen"}), r"<\|im_start\|>"),
    # --- the run directory
    ("a file", _file_in_place_of_folder, r"run\.output: .*run is a file"),
    (
        "something else",
        _folder_of_something_else,
        r"run\.output: .*not look like a run.*thesis\.tex.*nothing in it was touched",
    ),
    (
        "another run",
        _second_run,
        r"run\.output: .*holds another run, at step 6.*--resume.*--overwrite",
    ),
    (
        "read-only",
        lambda d: d.train("--run.output", "/proc/fastadapt"),
        r"run\.output: /proc/fastadapt cannot be created",
    ),
    ("nothing to resume", lambda d: d.train("--resume"), r"--resume: .*holds no run"),
    (
        "resume another",
        _resume_another,
        r"--resume: .*other values \(optimizer\.lr: 0\.002, was 0\.01\)",
    ),
    (
        "damaged checkpoints",
        _all_checkpoints_damaged,
        r"no checkpoint .* is whole \(.*step",
        1,
    ),
    ("checkpoint of another shape", _checkpoint_of_another_shape, r"checkpoint.*(shape|16)"),
]


@pytest.mark.parametrize("case", CASES, ids=[case[0].replace(" ", "-") for case in CASES])
def test_a_mistake_gets_one_clear_error(
    case: tuple[Any, ...], expect_error: Callable[..., None]
) -> None:
    _, arrange, *expected = case
    expect_error(arrange, *expected)


def test_every_case_has_words_of_its_own(emitted: dict[str, str]) -> None:
    """The messages of all cases that have run so far are different."""
    assert len({name for name, *_ in CASES}) == len(CASES) >= 30
    by_message: dict[str, list[str]] = {}
    for case, said in emitted.items():
        by_message.setdefault(said, []).append(case)
    assert {said: cases for said, cases in by_message.items() if len(cases) > 1} == {}
