"""Options, output and exit codes of the command line."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

OPTIONS = re.findall(
    r"\S+",
    """
--adapter --adapter.activation --adapter.bandwidth --adapter.base_mlp --adapter.bias
--adapter.implementation
--adapter.initial_threshold --adapter.k --adapter.kind --adapter.n_features
--data --data.bad_rows --data.bucket --data.columns --data.family --data.loss --data.markers
--data.max_tokens --data.max_validation --data.pack --data.pad_to
--data.revision --data.subset --data.train --data.train_on_prompt --data.train_split
--data.validation --data.validation_split --data.workers
--dry-run --gpu --gpus --help --json
--objective --objective.bridge --objective.checkpoint --objective.first_cutoff
--objective.kl_chunk_tokens --objective.l0 --objective.logits_dtype --objective.nmse
--objective.penalty --objective.penalty_scale --objective.sparsity --objective.sparsity_ramp
--optimizer --optimizer.accumulation --optimizer.batch_size --optimizer.betas --optimizer.clip
--optimizer.epochs --optimizer.eps --optimizer.lr --optimizer.masters --optimizer.max_steps
--optimizer.moments --optimizer.stochastic_rounding
--optimizer.warmup --optimizer.weight_decay
--overwrite
--pair --pair.attention --pair.base --pair.base_revision --pair.device --pair.dtype
--pair.fused_blocks --pair.offload --pair.target --pair.tokenizer
--pair.target_revision --pair.trust_remote_code
--print_config --resume
--run --run.checkpoint_every --run.dead_window --run.deterministic --run.eval_every
--run.init_from
--run.keep_checkpoints
--run.log_every --run.max_bad_batches --run.output --run.rank --run.rank_timeout --run.report
--run.seed
--run.sinks --run.threads --run.trains
""",
)


def test_the_options_of_train_are_frozen() -> None:
    """Scripts start runs, so removing or renaming an option breaks them."""
    from fastadapt.cli.train import train_parser

    assert sorted(train_parser().option_names()) == sorted(OPTIONS)


def test_the_help_of_train_names_every_family() -> None:
    from fastadapt.cli.train import train_parser
    from fastadapt.data.families import FAMILIES

    text = " ".join(train_parser().format_help().split())
    listed = text.partition("Families: ")[2].partition(";")[0].split(", ")
    assert sorted(listed) == sorted(FAMILIES)


PREPARE_OPTIONS = """
--allow_fewer --columns --family --help --markers --max_tokens --output --overwrite --reserve
--resume --revision --seed --shares --split --subset --thinking --tokenizer --train
--trust_remote_code --validation
"""


def test_the_options_of_data_prepare_are_frozen(fastadapt: Callable[..., Any]) -> None:
    text = fastadapt("data", "prepare", "--help").out
    assert sorted(set(re.findall(r"^  (?:-h, )?(--\w+)", text, re.MULTILINE))) == (
        PREPARE_OPTIONS.split()
    )
    assert "SOURCE" in text


INSPECT_OPTIONS = """
--base --columns --examples --family --help --loss --markers --max_tokens --pair --revision --rows
--split --subset --trust_remote_code
"""


def test_the_options_of_data_inspect_are_frozen(fastadapt: Callable[..., Any]) -> None:
    text = fastadapt("data", "inspect", "--help").out
    assert sorted(set(re.findall(r"^  (?:-h, )?(--\w+)", text, re.MULTILINE))) == (
        INSPECT_OPTIONS.split()
    )


EVAL_OPTIONS = """
--benchmarks --benchmarks.counted_words --benchmarks.data --benchmarks.examples
--benchmarks.few_shot
--benchmarks.hesitation_words
--benchmarks.limit --benchmarks.prefill --benchmarks.repetitions --benchmarks.seed
--benchmarks.tasks --device
--dtype --help --names --names+ --output --outputs --outputs.batch_tokens --outputs.chunk_tokens
--outputs.students_at_once --overwrite --partial --partial.batch_tokens --partial.chunk_tokens
--partial.streams_at_once --parts --parts+ --sampling --sampling.batch_size --sampling.batching
--sampling.degeneration --sampling.degeneration.min_count --sampling.degeneration.ngrams
--sampling.degeneration.share --sampling.degeneration.window --sampling.max_new_tokens
--sampling.seed --sampling.stop --sampling.stop_degenerate --sampling.temperature
--sampling.top_p --speed --speed.batch_size --speed.new_tokens --speed.prompt_tokens
--speed.rounds --statistics --statistics.level --statistics.resamples --statistics.seed --texts
--texts.n --texts.n_partial --texts.prefill --texts.prompts --trust_remote_code
"""


def test_the_options_of_eval_are_frozen() -> None:
    from fastadapt.cli.main import open_command

    assert sorted(open_command("eval").parser.option_names()) == EVAL_OPTIONS.split()


WHERE_OPTIONS = """
--benchmarks --benchmarks.counted_words --benchmarks.data --benchmarks.examples
--benchmarks.few_shot
--benchmarks.hesitation_words
--benchmarks.limit --benchmarks.prefill --benchmarks.repetitions --benchmarks.seed
--benchmarks.tasks --data
--data.bad_rows --data.columns --data.family --data.markers --data.max_tokens --data.max_validation
--data.revision --data.subset --data.validation --data.validation_split --generate --help --output
--overwrite --pair --pair.attention --pair.base --pair.base_revision --pair.device --pair.dtype
--pair.target --pair.target_revision --pair.tokenizer --pair.trust_remote_code --sampling
--sampling.batch_size --sampling.batching
--sampling.degeneration --sampling.degeneration.min_count --sampling.degeneration.ngrams
--sampling.degeneration.share --sampling.degeneration.window --sampling.max_new_tokens
--sampling.seed --sampling.stop --sampling.stop_degenerate --sampling.temperature
--sampling.top_p --statistics --statistics.level --statistics.resamples --statistics.seed --text
--where --where.batch_tokens --where.chunk_tokens --where.models_at_once --where.n
--where.positions --where.ranks
"""


def test_the_options_of_where_are_frozen() -> None:
    from fastadapt.cli.where import where_parser

    assert sorted(where_parser().option_names()) == WHERE_OPTIONS.split()


CONTRAST_OPTIONS = """
--batch_tokens --caliper --device --draws --dtype --entropy --factors --features --help --n
--output --overwrite --places --responses --scales --seed --statistics --statistics.level
--statistics.resamples --statistics.seed --trust_remote_code --words
"""


def test_the_options_of_contrast_are_frozen() -> None:
    from fastadapt.cli.main import open_command

    assert sorted(open_command("contrast").parser.option_names()) == CONTRAST_OPTIONS.split()


EXPORT_OPTIONS = (
    "--base --format --help --model_id --output --overwrite --source_set --store --target"
)
IMPORT_OPTIONS = "--format --help --model --output --overwrite"


@pytest.mark.parametrize(
    ("command", "options"), [("export", EXPORT_OPTIONS), ("import", IMPORT_OPTIONS)]
)
def test_the_options_of_formats_are_frozen(command: str, options: str) -> None:
    from fastadapt.cli.main import open_command

    assert sorted(open_command(command).parser.option_names()) == options.split()


PUSH_OPTIONS = "--base --help --license --private --target --tokenizer"


def test_the_options_of_push_are_frozen() -> None:
    from fastadapt.cli.main import open_command

    assert sorted(open_command("push").parser.option_names()) == PUSH_OPTIONS.split()


FEATURES = (
    "check classify collect compare describe effects export merge overlap select serve sets show"
)


def test_the_commands_are_frozen(fastadapt: Callable[..., Any]) -> None:
    from fastadapt.cli.main import COMMANDS

    features = [f"features {name}" for name in FEATURES.split()]
    frozen = ["changes", "contrast", "data inspect", "data prepare", "doctor", "eval", "export"]
    assert sorted(COMMANDS) == [
        *frozen,
        *features,
        "generate",
        "graph",
        "graph export",
        "graph serve",
        "import",
        "intervene",
        "push",
        "study",
        "trace",
        "train",
        "where",
    ]
    for command in COMMANDS:
        assert command in fastadapt("--help").out


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_no_torch(option: str) -> None:
    code = (
        "import sys; from fastadapt.cli.main import main; "
        f"main(['{option}']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_version_and_help(fastadapt: Callable[..., Any]) -> None:
    assert re.fullmatch(r"fastadapt \d+\.\d+\.\d+\S*\n", fastadapt("--version").out)
    assert fastadapt() == fastadapt("--help")
    assert fastadapt("--help").code == 0


def test_help_of_train_tells_every_option_with_its_meaning(fastadapt: Callable[..., Any]) -> None:
    outcome = fastadapt("train", "--help")
    assert outcome.code == 0
    for option in OPTIONS:
        assert option in outcome.out
    text = " ".join(outcome.out.split())
    assert "learning rate at the end of the warm-up" in text
    assert "default: 0.0008" in text


@pytest.mark.parametrize("preset", ["gated", "organism", "r1-distill-qwen-7b"])
def test_presets_parse_and_print_whole(fastadapt: Callable[..., Any], preset: str) -> None:
    from fastadapt.training.config import TrainConfig, from_dict, to_dict

    outcome = fastadapt("train", preset, "--print_config")
    assert outcome.code == 0
    config = from_dict(yaml.safe_load(outcome.out))
    assert isinstance(config, TrainConfig)
    assert to_dict(config) == yaml.safe_load(outcome.out)


def test_every_preset_is_tested_and_shipped() -> None:
    from fastadapt.cli.train import preset_names

    known = ["r1-distill-qwen-1.5b", "r1-distill-qwen-7b", "r1-distill-qwen-7b-text"]
    assert preset_names() == ["gated", "organism", "qwq-32b", *known]


@pytest.mark.parametrize("first", [True, False])
def test_what_is_typed_wins_over_the_file_wherever_it_stands(
    fastadapt: Callable[..., Any], recipe: Callable[..., Path], first: bool
) -> None:
    path = recipe()
    typed = ["--optimizer.lr", "3e-3", "--optimizer.betas", "[0.5, 0.75]", "--adapter.k=null"]
    order = [path, *typed] if first else [*typed, path]
    config = yaml.safe_load(fastadapt("train", *order, "--print_config").out)
    assert config["optimizer"]["lr"] == 3e-3
    assert config["optimizer"]["betas"] == [0.5, 0.75]
    assert config["optimizer"]["batch_size"] == 2  # from the file
    assert config["optimizer"]["epochs"] == 1  # from the dataclass


def test_training_prints_the_table_and_the_report(
    fastadapt: Callable[..., Any], recipe: Callable[..., Path], tmp_path: Path
) -> None:
    outcome = fastadapt("train", recipe(), "--run.report", "true")
    assert outcome.code == 0, outcome.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    rows = {
        cells[0].strip(): [c.strip() for c in cells[1:]]
        for cells in (line.split("│") for line in outcome.out.splitlines())
        if len(cells) == 4
    }
    kl = rows["KL, nats per token"]
    assert float(kl[0]) == pytest.approx(summary["kl_hybrid"], rel=1e-2)
    assert float(kl[1]) == pytest.approx(summary["kl_adapter"], rel=1e-2)
    assert kl[2] == "0"
    assert rows["top-1 error"][1] == f"{100 * summary['top1_error_adapter']:.1f}%"
    assert "NMSE after layer 1" in rows
    written = re.search(r"^report:\s+(\S+)$", outcome.out, re.MULTILINE)
    assert written is not None
    report = Path(written[1])
    assert report == tmp_path / "run" / "report.html"
    assert report.is_file()
    assert "<h3>Output KL</h3>" in report.read_text(encoding="utf-8")
    # Without a terminal, progress is lines with rate and remaining time, without carriage returns.
    assert "\r" not in outcome.err
    assert re.search(r"step 6/6 .*KL .*L0 .*tok/s .*left", outcome.err)
    assert "held-out KL" in outcome.err


def test_a_dry_run_reads_no_weights_and_makes_no_folder(
    fastadapt: Callable[..., Any],
    recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import safetensors

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(safetensors, "safe_open", refuse)
    outcome = fastadapt("train", recipe(), "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "Peak:" in outcome.out
    assert "It fits into" in outcome.out
    assert re.search(r"about \S+ s and \S+ h for the run, at \d+% of the \S+ TFLOP/s", outcome.out)
    assert "the share of a step of two layers, timed here" in outcome.out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["full", pytest.param("auto", marks=pytest.mark.slow)])
def test_the_papers_run_is_planned_offline(
    policy: str, fastadapt: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plan for an 80 GB GPU and 10,000 tokens; standard output is one JSON object.

    ``auto`` measures every policy, which takes a minute.
    """
    import socket

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was fetched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    command = ["train", "r1-distill-qwen-7b", "--dry-run", "--json"]
    outcome = fastadapt(*command, "--objective.checkpoint", policy)
    assert outcome.code == 0, outcome.err
    planned = json.loads(outcome.out)
    assert (planned["tokens_per_sequence"], planned["steps"]) == (10_000, 50_000)
    assert planned["device"]["memory_bytes"] == 80 * 10**9
    assert planned["device"]["source"].startswith("data sheet")
    peaks = [*planned["phases"].values(), *(each["peak_bytes"] for each in planned["recompute"])]
    assert planned["peak_bytes"] == max(peaks) <= 76e9
    assert planned["fits"] is True
    assert planned["hours"] == pytest.approx(planned["steps"] * planned["step_s"] / 3600)
    assert planned["share"] is None  # a data sheet's rate: the time is a lower bound
    assert planned["step_s"] == planned["flops_per_step"] / planned["device"]["flops_per_s"]
    assert planned["flops_per_step"] < 900e12
    assert planned["checkpoint"] == policy
    if policy == "full":
        return
    longest, median = planned["recompute"]
    assert (longest["tokens"], median["tokens"]) == (10_000, 7600)
    for each in (longest, median):
        assert sum(each["layers"].values()) == pytest.approx(28)
        assert each["peak_bytes"] <= 76e9
    assert longest["layers"]["none"] < median["layers"]["none"]


@pytest.mark.slow
def test_what_does_not_fit_comes_with_a_way_out(fastadapt: Callable[..., Any]) -> None:
    wide = ["--optimizer.masters", "true", "--adapter.n_features", "16384"]
    wide += ["--objective.checkpoint", "full"]
    text = fastadapt("train", "r1-distill-qwen-7b", "--dry-run", "--gpu", "h100", *wide).out
    assert "DOES NOT FIT" in text
    shown = re.search(r"Peak: ([\d.]+) GB", text)
    assert shown is not None
    peak = float(shown[1])
    for name in ("optimizer.masters false", "adapter.n_features 8192", "data.max_tokens 5000"):
        shown = re.search(rf"{name} +│ +([\d.]+) GB", text)
        assert shown is not None
        assert float(shown[1]) < peak


def test_what_a_dry_run_refuses(fastadapt: Callable[..., Any]) -> None:
    train = ["train", "r1-distill-qwen-7b"]
    assert "--json goes with --dry-run" in fastadapt(*train, "--json").err
    assert "--gpu goes with --dry-run" in fastadapt(*train, "--gpu", "h100").err
    outcome = fastadapt(*train, "--dry-run", "--gpu", "tpu")
    assert outcome.code == 2
    assert "--gpu: expected one of a100, h100, h200, got 'tpu'" in outcome.err


def test_a_stopped_run_says_how_to_go_on_and_does(
    fastadapt: Callable[..., Any],
    recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGTERM after the second step exits with 0; the printed command finishes the run."""
    import os
    import shlex
    import signal

    from fastadapt.cli.progress import Progress

    path = recipe()
    show = Progress.record

    def kill_at_two(self: Progress, record: dict) -> None:
        show(self, record)
        if (record["kind"], record["step"]) == ("train", 2):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "record", kill_at_two)
        outcome = fastadapt("train", path, "--optimizer.lr", "5e-3", "--run.report", "true")
    assert outcome.code == 0, outcome.err
    assert "Stopped at step 2 of 6" in outcome.out
    assert "not finished" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    said = re.search(r"^Resume with:\s+fastadapt (.*)$", outcome.out, re.MULTILINE)
    assert said is not None
    command = said[1]
    assert command == f"train {path} --optimizer.lr 5e-3 --run.report true --resume"
    again = fastadapt(*shlex.split(command))
    assert again.code == 0, again.err
    assert "resuming after step 2 of 6" in again.err
    assert "report:" in again.out


def test_nothing_is_overwritten_without_being_asked(
    fastadapt: Callable[..., Any], recipe: Callable[..., Path], tmp_path: Path
) -> None:
    path = recipe()
    assert fastadapt("train", path).code == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    refused = fastadapt("train", path)
    assert refused.code == 2
    assert "--overwrite" in refused.err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert fastadapt("train", path, "--overwrite").code == 0


def test_a_bug_keeps_its_traceback(
    fastadapt: Callable[..., Any], recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastadapt.training import trainer

    def break_down(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(trainer, "train", break_down)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        fastadapt("train", recipe())


@pytest.mark.slow
def test_the_installed_command_exits_with_the_code() -> None:
    from shutil import which

    command = which("fastadapt", path=str(Path(sys.executable).parent))
    assert command is not None
    done = subprocess.run([command, "tran"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: unknown command 'tran'; did you mean train?")
    assert "Traceback" not in done.stderr


def test_an_interrupt_ends_without_a_traceback(
    fastadapt: Callable[..., Any], recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastadapt.training import trainer

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "train", interrupt)
    outcome = fastadapt("train", recipe())
    assert outcome.code == 130
    assert outcome.err.endswith("error: interrupted\n")
