"""Commands and code in the README and the docs pages run as printed."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from organism_runs import make_run

from fastadapt.evaluation.models_under_test import ModelSet

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")))
}
README = PAGES["README.md"]


def blocks(language: str, *pages: str) -> list[str]:
    text = "\n".join(PAGES[page] for page in pages or PAGES)
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_adapter_in_ten_lines_runs(capsys: pytest.CaptureFixture[str]) -> None:
    _, code = blocks("python", "README.md")
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 10
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    gradients = {name: p.grad for name, p in names["adapter"].named_parameters()}
    assert set(gradients) == {"W_enc", "b_enc", "W_dec", "b_dec"}
    assert all(g is not None for g in gradients.values())
    assert gradients["W_dec"].abs().sum() > 0
    assert 200 < float(capsys.readouterr().out.split("(")[-1].rstrip(")\n")) < 312  # half of 512


def test_a_run_shows_itself_in_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = blocks("python", "README.md")
    shutil.copytree(
        Path(__file__).parent / "old_files" / "finished", tmp_path / "runs" / "organism"
    )
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("│")[1].strip() for row in rows[2:6]] == ["␣tom", "␣has", "␣3", "␣apples"]
    names: dict[str, Any] = {}
    for code in blocks("python", "docs/python.md"):
        exec(compile(code, "docs/python.md", "exec"), names)
    out = capsys.readouterr().out
    assert "Layer 2, feature 7\n" in out
    assert "mean KL to the target" in out
    assert out.count("\n[") == 1


def test_the_op_runs() -> None:
    (code,) = blocks("python", "docs/kernels.md")
    names: dict[str, Any] = {}
    exec(compile(code, "docs/kernels.md", "exec"), names)
    assert names["out"].shape == names["x"].shape
    assert 0 < names["stats"].n_active <= min(8 * 20, names["plan"].capacity)


def test_features_are_scaled_for_one_prompt(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", n_features=512)
    model = ModelSet.open([run], device="cpu").model
    names = {"model": model, "input_ids": torch.tensor([[5, 6, 7]])}
    before = model(input_ids=names["input_ids"]).logits
    exec(compile(blocks("python", "docs/features.md")[0], "docs/features.md", "exec"), names)
    assert torch.equal(model(input_ids=names["input_ids"]).logits, before)


def test_the_commands_are_understood(tmp_path: Path) -> None:
    from fastadapt.cli.main import COMMANDS, open_command
    from fastadapt.cli.train import parse_train
    from fastadapt.cli.where import parse_where

    values = yaml.safe_load(blocks("yaml", "README.md")[0])
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    seen = 0
    for line in "".join(blocks("bash")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] == ["fastadapt", "train"] and "--help" not in words:
            words = [w.replace("$sparsity", "3e-4") for w in words]
            argv = [str(tmp_path / w) if w == "mine.yaml" else w for w in words[2:]]
            config, flags = parse_train(argv)
            if not {"skyline", "norms", "lora"} & set(argv):  # these have their own tests
                assert config.optimizer.lr == (4e-4 if "--optimizer.lr" in argv else 8e-4)
            assert flags.resume == ("--resume" in argv)
            seen += 1
        elif words[:2] == ["fastadapt", "where"]:
            argv = [str(tmp_path / w) if w == "mine.yaml" else w for w in words[2:]]
            request, folder, _ = parse_where(argv)
            assert request.generate == ("--generate" in argv)
            assert (request.text is None) == folder.name.endswith("where")
            seen += 1
        elif words[:1] == ["fastadapt"] and "--help" not in words:
            n_words = 3 if " ".join(words[1:3]) in COMMANDS else 2
            typed = open_command(" ".join(words[1:n_words])).parse(words[n_words:])
            if words[1] == "eval":
                few_shot = 4 if "--benchmarks.few_shot" in words else 0
                assert typed["config"].benchmarks.few_shot == few_shot
                assert len(typed["runs"]) in (2, 3)
            seen += 1
        elif words[:1] == ["python"]:
            program = words[1] if words[1] != "-m" else words[2].replace(".", "/") + ".py"
            assert (ROOT / program).is_file()
            seen += 1
    assert seen == 74


@pytest.mark.parametrize("target", ["train", "test", "proof", "reproduce", "study", "real"])
def test_the_make_targets_exist(target: str) -> None:
    assert any(f"make {target}" in page for page in PAGES.values())
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_no_comment_is_left(page: str) -> None:
    assert "<!--" not in PAGES[page]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", PAGES[page]):
        assert ((ROOT / page).parent / link).exists(), link


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 180
