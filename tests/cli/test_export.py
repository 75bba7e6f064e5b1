"""`fastadapt export` writes checkpoints that other libraries load, and reads them as adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastadapt.models.trained_files import load_adapters

IDS = torch.tensor([[7, 8, 9, 10]])


def of_the_run(folder: Path) -> torch.Tensor:
    """Return the logits of a run's replacement model, assembled from pair and adapters."""
    from fastadapt.models.replacement import ModelPair, PairConfig, ReplacementModel

    adapters, metadata = load_adapters(folder / "adapter")
    pair = ModelPair.load(PairConfig(metadata["target"], metadata["base"], device="cpu"))
    with torch.no_grad():
        return ReplacementModel(pair, adapters)(IDS).logits


def run_printed_code(outcome: Any) -> dict:
    """Run the printed line of code and return its variables."""
    assert (outcome.code, outcome.err) == (0, "")
    names: dict = {}
    exec(outcome.out.removeprefix("Load it with:").strip(), names)
    return names


def test_a_run_crosses_over_and_comes_back(
    desk: Any, fastadapt: Callable[..., Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    run = desk.finished_run()
    expected = of_the_run(run)
    out = tmp_path / "checkpoint"
    outcome = fastadapt("export", run, "--output", out)
    with torch.no_grad():
        assert torch.equal(run_printed_code(outcome)["model"](IDS).logits, expected)

    published, adapters = tmp_path / "published", tmp_path / "adapters"
    outcome = fastadapt("export", run, "--output", published, "--format", "hu2026")
    loaded = run_printed_code(outcome)["model"]
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, expected)

    outcome = fastadapt("export", published, "--output", adapters, "--format", "adapters")
    ours, theirs = load_adapters(run / "adapter")[0], run_printed_code(outcome)["adapters"]
    for name, tensor in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor)
    again = tmp_path / "again"
    outcome = fastadapt("export", adapters, "--output", again, "--target", desk.pair / "target")
    assert outcome.code == 0, outcome.err
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(again)(IDS).logits, expected)


def test_the_embedded_pair_exports_by_its_names(
    fastadapt: Callable[..., Any], tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoTokenizer

    from fastadapt.adapter.files import save_adapters
    from fastadapt.adapter.module import AdapterConfig, TranscoderAdapter
    from fastadapt.organism import FOLDER

    adapters = [TranscoderAdapter(128, AdapterConfig(8)) for _ in range(4)]
    metadata = {"target": "organism/target", "base": "organism/base"}
    save_adapters(adapters, tmp_path / "adapters", metadata)
    assert fastadapt("export", tmp_path / "adapters", "--output", tmp_path / "out").code == 0
    assert AutoConfig.from_pretrained(tmp_path / "out").max_position_embeddings == 512
    ours, theirs = (AutoTokenizer.from_pretrained(p) for p in (tmp_path / "out", FOLDER / "target"))
    assert type(ours) is type(theirs)
    text = "<｜User｜>What is 3 plus 4?<｜Assistant｜><think>\n3 + 4 = 7"
    assert ours(text).input_ids == theirs(text).input_ids


MISTAKES = {
    "nothing there": (
        lambda desk: ["export", desk.folder / "no", "--output", desk.folder / "out"],
        r"expected a run or a folder of adapters with fastadapt\.json",
    ),
    "an output in use": (
        lambda desk: ["export", desk.folder / "no", "--output", desk.pair],
        "--output: .* is neither an empty folder nor an export; give a new folder",
    ),
    "no output": (lambda desk: ["export", desk.folder], "--output is missing|output"),
    "a format that is none": (
        lambda desk: ["export", desk.folder, "--output", "x", "--format", "onnx"],
        "--format: expected one of 'huggingface', .*'neuronpedia', got 'onnx'",
    ),
    "adapters of a plain model": (
        lambda desk: [
            "export",
            desk.pair / "target",
            "--output",
            desk.folder / "out",
            "--format",
            "adapters",
        ],
        "expected a checkpoint of Qwen2ForCausalLMWithTranscoder",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str, expect_error: Callable[..., None]) -> None:
    expect_error(*MISTAKES[mistake])


def test_a_run_that_is_not_finished(desk: Any, expect_error: Callable[..., None]) -> None:
    run = desk.finished_run()
    (run / "adapter" / "fastadapt.json").unlink()
    expect_error(lambda desk: ["export", run, "--output", desk.folder / "out"], "not finished")


def test_an_export_is_replaced_with_overwrite_alone(
    desk: Any, fastadapt: Callable[..., Any], tmp_path: Path
) -> None:
    run, out = desk.finished_run(), tmp_path / "out"
    assert fastadapt("export", run, "--output", out).code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    again = fastadapt("export", run, "--output", out)
    assert again.code == 2
    assert "--overwrite" in again.err
    (out / "config.json").write_text('{"model_type": "fastadapt_qwen2"}')
    assert fastadapt("export", run, "--output", out, "--overwrite").code == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "notes.txt").write_text("mine")
    assert fastadapt("export", run, "--output", out, "--overwrite").code == 2
    for other in (desk.pair / "target", run / "adapter"):
        refused = fastadapt("export", run, "--output", other, "--overwrite")
        assert (refused.code, "nor an export" in refused.err) == (2, True)
