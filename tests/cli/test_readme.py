"""Commands and code in the README and the docs pages run as printed.

Every Python block compiles, and its names resolve. Blocks whose fence says ``run`` are executed in
their order, in a folder with a finished run.
"""

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from printed_code import lines, unresolved

from fastadapt import load_run

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")))
}
README = PAGES["README.md"]


def blocks(language: str, *pages: str) -> list[str]:
    text = "\n".join(PAGES[page] for page in pages or PAGES)
    return re.findall(rf"^```{language}(?: run)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_adapter_in_ten_lines_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = blocks("python", "docs/library.md")[-1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    names: dict[str, Any] = {}
    exec(compile(code, "docs/library.md", "exec"), names)
    gradients = {name: p.grad for name, p in names["adapter"].named_parameters()}
    assert set(gradients) == {"W_enc", "b_enc", "W_dec", "b_dec"}
    assert all(g is not None for g in gradients.values())
    assert gradients["W_dec"].abs().sum() > 0
    assert 200 < float(capsys.readouterr().out.split("(")[-1].rstrip(")\n")) < 312  # half of 512


@pytest.fixture
def finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder with the finished run runs/organism."""
    shutil.copytree(Path(__file__).parent / "old_files" / "finished", tmp_path / "runs/organism")
    monkeypatch.chdir(tmp_path)


def test_a_run_gives_the_features_of_a_text(
    finished_run: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = blocks("python", "README.md")
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


def test_features_are_scaled_for_one_prompt(finished_run: None) -> None:
    names: dict[str, Any] = {}
    exec(compile(blocks("python", "docs/features.md")[0], "docs/features.md", "exec"), names)
    before = load_run("runs/organism").model(input_ids=names["input_ids"]).logits
    assert torch.equal(names["run"].model(input_ids=names["input_ids"]).logits, before)
    assert names["changed"].shape[1] > names["input_ids"].shape[1]


def test_the_commands_are_understood(tmp_path: Path) -> None:
    from fastadapt.cli.main import COMMANDS, open_command
    from fastadapt.cli.train import parse_train
    from fastadapt.cli.where import parse_where

    values = yaml.safe_load(blocks("yaml", "docs/your-pair.md")[0])
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    seen = 0
    for line in lines(*blocks("bash")):
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
                assert len(typed["runs"]) in (1, 2, 3)
            seen += 1
        elif words[:1] == ["python"]:
            program = words[1] if words[1] != "-m" else words[2].replace(".", "/") + ".py"
            assert (ROOT / program).is_file()
            seen += 1
    assert seen == 98


@pytest.mark.parametrize("page", [page for page in PAGES if blocks("python", page)])
def test_python_blocks_compile_and_their_names_resolve(page: str) -> None:
    """A block may use the names of earlier blocks on its page."""
    code = "\n".join(blocks("python", page))
    compile(code, page, "exec")
    assert unresolved(code) == []


@pytest.mark.parametrize(
    ("code", "missing"),
    [
        ("from fastadapt import load_run\nrun = load_run('x')\nrun.model\n", []),
        ("from fastadapt import open_run\n", ["open_run"]),
        ("import torch\nx = torch.randm(2)\n", ["torch.randm"]),
        ("def half(x):\n    return x / 2\nhalf(y)\n", ["y"]),
        ("with scale_features(model, {}):\n    pass\n", ["scale_features", "model"]),
    ],
)
def test_a_name_that_does_not_exist_is_reported(code: str, missing: list[str]) -> None:
    assert unresolved(code) == missing


def runnable(page: str) -> list[tuple[str, str]]:
    """Return language and code of the blocks whose fence says ``run``."""
    return re.findall(r"^```(bash|python) run\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)])
def test_runnable_blocks_run(
    page: str, fastadapt: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command ends with exit code 0, on a run of the embedded pair after 40 steps."""
    monkeypatch.chdir(tmp_path)
    short = ["--optimizer.max_steps", 40, "--data.max_validation", 20, "--run.eval_every", 40]
    assert fastadapt("train", "organism", *short).code == 0
    for language, code in runnable(page):
        if language == "python":
            exec(compile(code, page, "exec"), {})
            continue
        for line in lines(code):
            program, *words = shlex.split(line, comments=True)
            assert program == "fastadapt"
            outcome = fastadapt(*words)
            assert outcome.code == 0, (line, outcome.err)


@pytest.mark.parametrize(
    "target", ["train", "test", "docs", "notebooks", "proof", "reproduce", "study", "real"]
)
def test_the_make_targets_exist(target: str) -> None:
    assert any(f"make {target}" in page for page in PAGES.values())
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_ci_runs_the_blocks_of_the_pages() -> None:
    """The workflow calls make targets that exist, and one of them runs this file's slow tests."""
    workflow = (ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(r"- run: make (.*)$|target: (\w+)", workflow, re.MULTILINE)
    targets = {word for pair in commands for word in " ".join(pair).split() if word.isalpha()}
    assert targets >= {"docs", "slow", "interop", "coverage"}
    recipes = {t: re.search(rf"^{t}:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE) for t in targets}
    assert None not in recipes.values()
    slow = recipes["slow"]
    assert slow is not None
    assert "-m slow" in slow[1]
    for path in ("tests/cli/test_readme.py", "tests/packaging", "tests/adapter"):
        assert path in slow[1]
        assert (ROOT / path).exists()


@pytest.mark.parametrize("page", PAGES)
def test_no_comment_is_left(page: str) -> None:
    assert "<!--" not in PAGES[page]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", PAGES[page]):
        assert ((ROOT / page).parent / link).exists(), link


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 100
