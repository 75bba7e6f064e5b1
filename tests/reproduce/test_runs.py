"""The scripts that train the runs of the embedded pair's evaluation."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastadapt.cli.train import OVERLAYS, parse_train, read_yaml
from fastadapt.training.config import differences
from reproduce import matching

SCRIPTS = Path(__file__).parents[2] / "reproduce"


def runs() -> dict[str, list[str]]:
    """Return the arguments of each run that depends on no other, by name."""
    text = (SCRIPTS / "runs").read_text(encoding="utf-8")
    lines = text.split("<<'RUNS'\n")[1].split("RUNS\n")[0].splitlines()
    return {name: arguments for name, *arguments in map(str.split, lines)}


def finished(folder: Path, l0s: dict[str, float]) -> None:
    """Write the files of finished runs that ``matching`` reads."""
    for name, l0 in l0s.items():
        config = parse_train(["organism", *runs()[name]])[0]
        metadata = {
            "objective": {"sparsity": config.objective.sparsity},
            "measured": {"l0_mean": l0, "tokens": 831_016},
        }
        (folder / name / "adapter").mkdir(parents=True)
        card = folder / name / "adapter" / "fastadapt.json"
        card.write_text(json.dumps({"metadata": metadata}))
        start = {"kind": "start", "epoch_tokens": 173_213, "sequences": 2000}
        (folder / name / "metrics.jsonl").write_text(json.dumps(start) + "\n{}\n")


#: L0 of runs of 900 steps, which docs/results.md had.
MEASURED = dict(zip(matching.SWEEP, (0.44, 0.778, 1.78, 4.28, 9.73), strict=True))


def test_the_runs_parse_and_differ_as_intended() -> None:
    configs = {name: parse_train(["organism", *argv])[0] for name, argv in runs().items()}
    sweep = [name for name in configs if re.fullmatch(r"sparsity-[\d.e-]+", name)]
    sparsities = [configs[name].objective.sparsity for name in sweep]
    assert sorted(sweep) == sorted(matching.SWEEP)
    assert sorted(sparsities) == sparsities
    assert [float(name.removeprefix("sparsity-")) for name in sweep] == sparsities
    assert configs["dense"].objective.sparsity == 0
    bridged, bare = configs[matching.TARGET], configs["no-bridge"]
    assert (bare.objective.sparsity, bare.objective.bridge) == (bridged.objective.sparsity, 0)
    assert not configs["whole-mlp"].adapter.base_mlp
    kinds = {"skyline": "mlp", "norms": "norms", "lora": "lora", "bias": "bias"}
    assert {name: configs[name].run.trains for name in kinds} == kinds
    steps = {configs[name].optimizer.max_steps for name in configs if name != "norms"}
    assert steps == {parse_train(["organism"])[0].optimizer.max_steps}
    assert all(config.run.threads == 1 for config in configs.values())
    repeated = [configs[f"{matching.TARGET}{end}"] for end in ("", *(f"-seed{s}" for s in (1, 2)))]
    assert tuple(config.run.seed for config in repeated) == matching.SEEDS
    for other in repeated[1:]:
        assert set(differences(repeated[0], other)) == {"run.seed"}


def test_dependent_runs_match_the_l0_and_scale_the_tokens(tmp_path: Path) -> None:
    finished(tmp_path, {**MEASURED, "no-bridge": 6.18, "whole-mlp": 9.73})
    lines = {name: argv for name, *argv in map(str.split, matching.runs(tmp_path))}
    configs = {name: parse_train(["organism", *argv])[0] for name, argv in lines.items()}
    assert len(lines) == 7
    for pilot in matching.PILOTS:
        group = [config for name, config in configs.items() if name.startswith(pilot)]
        assert tuple(config.run.seed for config in group) == matching.SEEDS
        for other in group[1:]:
            assert set(differences(group[0], other)) == {"run.seed"}
        pilots = parse_train(["organism", *runs()[pilot]])[0]
        assert set(differences(pilots, group[0])) <= {"objective.sparsity"}
    # By hand: λ(6.18) of the sweep is 0.00760, so the shift is 0.0043 / 0.00760.
    assert configs["no-bridge-matched"].objective.sparsity == pytest.approx(0.00243, rel=0.01)
    assert configs["whole-mlp-matched"].objective.sparsity == 3.7e-2  # matched already
    scaled = configs["norms-scaled"]
    tokens = (scaled.optimizer.max_steps or 0) * scaled.optimizer.batch_size * 173_213 / 2000
    assert tokens == pytest.approx(831_016 * 1e6 / (50_000 * 7_600), rel=0.03)


def test_matching_moves_l0_the_right_way() -> None:
    sweep = [(0.23, 0.44), (0.1, 0.778), (0.037, 1.78), (0.012, 4.28), (0.0043, 9.73)]
    for weight, l0 in sweep:  # a point of the sweep itself needs no change
        for other, reached in sweep:
            assert matching.matched_sparsity(sweep, (weight, l0), reached) == pytest.approx(other)
    assert matching.matched_sparsity(sweep, (0.1, 30.0), 9.73) > 0.1  # too dense: a larger λ
    assert matching.matched_sparsity(sweep, (0.1, 0.2), 9.73) < 0.1


def test_matching_needs_the_runs_it_depends_on(tmp_path: Path) -> None:
    finished(tmp_path, MEASURED)
    command: list[str | Path] = [sys.executable, SCRIPTS / "matching.py", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "whole-mlp/adapter/fastadapt.json: expected a finished run; train it" in result.stderr


def test_make_compares_every_run(tmp_path: Path) -> None:
    """In one order, of which groups of seeds are neighbours."""
    finished(tmp_path, {**MEASURED, "no-bridge": 6.18, "whole-mlp": 9.73})
    trained = [*runs(), *(line.split()[0] for line in matching.runs(tmp_path))]
    printed = subprocess.run(
        ["make", "-n", "reproduce"], cwd=SCRIPTS.parent, capture_output=True, text=True, check=True
    )
    (command,) = (line for line in printed.stdout.splitlines() if "fastadapt eval" in line)
    assert sorted(re.findall(r"runs/reproduce/(\S+)", command)) == sorted(trained)


def test_the_preset_uses_the_best_rate_of_the_sweep() -> None:
    rates = re.search(
        r"for lr in (.*); do", (SCRIPTS / "skyline_sweep").read_text(encoding="utf-8")
    )
    assert rates is not None
    path = OVERLAYS / "organism" / "skyline.yaml"
    recorded = dict(re.findall(r"^# +(\S+) +(0\.\d+) +\d", path.read_text(encoding="utf-8"), re.M))
    assert list(recorded) == rates[1].split()
    best = min(recorded, key=lambda rate: float(recorded[rate]))
    assert read_yaml(path)["optimizer"]["lr"] == float(best)


def test_only_named_runs_are_trained(tmp_path: Path) -> None:
    program = tmp_path / "fastadapt"
    program.write_text(
        "#!/bin/bash\necho 'The adapter recovers 1%'\n"
        'while [ "$1" != --run.output ]; do shift; done\n'
        'mkdir -p "$2" && touch "$2/summary.json"\n'
    )
    program.chmod(0o755)
    command: list[str | Path] = [
        SCRIPTS / "runs",
        tmp_path / "runs",
        "1",
        "sparsity-4.3e-3",
        "norms",
    ]
    environment = {**os.environ, "FASTADAPT": str(program)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert result.returncode == 0, result.stderr
    trained = {path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()}
    assert trained == {"sparsity-4.3e-3", "norms"}
    # Runs that depend on others get their arguments from them.
    finished(tmp_path / "more", {**MEASURED, "no-bridge": 6.18, "whole-mlp": 9.73})
    environment["PYTHON"] = sys.executable
    command[1:] = [tmp_path / "more", "1", "no-bridge-matched-seed1", "norms-scaled"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert result.returncode == 0, result.stderr
    said = dict(re.findall(r"^(\S+): fastadapt train organism (.*)$", result.stdout, re.M))
    expected = dict(line.split(maxsplit=1) for line in matching.runs(tmp_path / "more"))
    assert said == {name: expected[name] for name in ("no-bridge-matched-seed1", "norms-scaled")}
    # `make study` trains one of these runs.
    studied = re.search(r"^STUDIED := (\S+)$", (SCRIPTS.parent / "Makefile").read_text(), re.M)
    assert studied is not None
    assert studied[1] in runs()


def test_the_real_pair_is_collected_and_its_pages_are_written(tmp_path: Path) -> None:
    """The script's commands in their order; a second call resumes the training."""
    program = tmp_path / "fastadapt"
    program.write_text(
        '#!/bin/bash\necho "$@" >> calls\nif [ "$1" = train ]; then\n'
        "  mkdir -p runs/real && touch runs/real/{config.yaml,summary.json}\nfi\n"
    )
    (tmp_path / "python").write_text('#!/bin/bash\necho "$@" >> calls\n')
    for path in (program, tmp_path / "python"):
        path.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command: list[str | Path] = ["bash", SCRIPTS / "real" / "run"]
    for again in (False, True):
        subprocess.run(command, cwd=tmp_path, env=environment, timeout=60, check=True)
        calls = (tmp_path / "calls").read_text().splitlines()
        (tmp_path / "calls").unlink()
        assert ("--resume" in calls[2]) == again
        commands = [re.split(r" [-./r]", call.removeprefix("-m "))[0] for call in calls[2:]]
        assert commands == [
            "train",
            "eval",
            "features collect",
            "features export",
            "changes",
            "reproduce.real check",
        ]


@pytest.mark.slow
def test_runs_train_resume_and_are_not_repeated(tmp_path: Path) -> None:
    program = tmp_path / "fastadapt"
    options = "--optimizer.max_steps 2 --run.eval_every 0 --data.max_validation 2"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m fastadapt "$@" {options}\n')
    program.chmod(0o755)
    environment = {
        **os.environ,
        "FASTADAPT": str(program),
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
    }
    command: list[str | Path] = [SCRIPTS / "runs", tmp_path / "runs", "2"]
    for again in (False, True):
        if again:  # mark one run as unfinished
            (tmp_path / "runs" / "norms" / "summary.json").unlink()
        result = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=900
        )
        assert result.returncode == 0, result.stderr
        assert len(re.findall(r"^[\w.-]+: The .* recovers? -?\d", result.stdout, re.M)) == 21
        logs = [path.read_text() for path in (tmp_path / "runs").glob("*.log")]
        assert ["step 1/2" in log for log in logs] == [not again] * 21
    program.write_text("#!/bin/sh\necho 'error: no' >&2\nexit 2\n")
    failed = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert failed.returncode != 0
    assert "error: no" in failed.stderr
