"""The scripts that train the runs of the embedded pair's evaluation."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastadapt.cli.train import OVERLAYS, parse_train, read_yaml

SCRIPTS = Path(__file__).parents[2] / "reproduce"


def runs() -> dict[str, list[str]]:
    """Return the arguments of each run, by name."""
    text = (SCRIPTS / "runs").read_text(encoding="utf-8")
    lines = text.split("<<'RUNS'\n")[1].removesuffix("RUNS\n").splitlines()
    return {name: arguments for name, *arguments in map(str.split, lines)}


def test_the_nine_runs_parse_and_differ_as_intended() -> None:
    longer = str(SCRIPTS / "longer.yaml")
    configs = {name: parse_train(["organism", longer, *argv])[0] for name, argv in runs().items()}
    assert len(configs) == 9
    sweep = [name for name in configs if name.startswith("sparsity-")]
    sparsities = [configs[name].objective.sparsity for name in sweep]
    assert len(sweep) == 5
    assert sorted(sparsities) == sparsities
    assert [float(name.removeprefix("sparsity-")) for name in sweep] == sparsities
    assert configs["dense"].objective.sparsity == 0
    bridged, bare = configs[sweep[0]], configs["no-bridge"]
    assert (bare.objective.sparsity, bare.objective.bridge) == (bridged.objective.sparsity, 0)
    assert (configs["skyline"].run.trains, configs["norms"].run.trains) == ("mlp", "norms")
    steps = {configs[name].optimizer.max_steps for name in configs if name != "norms"}
    assert steps == {read_yaml(SCRIPTS / "longer.yaml")["optimizer"]["max_steps"]}
    assert all(config.run.threads == 1 for config in configs.values())


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
    # `make study` trains one of these runs.
    studied = re.search(r"^STUDIED := (\S+)$", (SCRIPTS.parent / "Makefile").read_text(), re.M)
    assert studied is not None
    assert studied[1] in runs()


@pytest.mark.slow
def test_runs_train_resume_and_are_not_repeated(tmp_path: Path) -> None:
    program = tmp_path / "fastadapt"
    options = "--optimizer.max_steps 2 --run.eval_every 0 --data.max_validation 2"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m fastadapt "$@" {options}\n')
    program.chmod(0o755)
    environment = {**os.environ, "FASTADAPT": str(program), "OMP_NUM_THREADS": "1"}
    command: list[str | Path] = [SCRIPTS / "runs", tmp_path / "runs", "2"]
    for again in (False, True):
        if again:  # mark one run as unfinished
            (tmp_path / "runs" / "norms" / "summary.json").unlink()
        result = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=900
        )
        assert result.returncode == 0, result.stderr
        assert len(re.findall(r"^[\w.-]+: The .* recovers? -?\d", result.stdout, re.M)) == 9
        logs = [(tmp_path / "runs" / f"{name}.log").read_text() for name in runs()]
        assert ["step 1/2" in log for log in logs] == [not again] * 9
    program.write_text("#!/bin/sh\necho 'error: no' >&2\nexit 2\n")
    failed = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert failed.returncode != 0
    assert "error: no" in failed.stderr
