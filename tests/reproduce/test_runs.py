"""The scripts that train what the evaluation of the embedded pair compares."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastadapt.cli.train import OVERLAYS, parse_train, read_yaml

SCRIPTS = Path(__file__).parents[2] / "reproduce"


def runs() -> dict[str, list[str]]:
    """Arguments of each run, by its name."""
    text = (SCRIPTS / "runs").read_text(encoding="utf-8")
    lines = text.split("<<'RUNS'\n")[1].removesuffix("RUNS\n").splitlines()
    return {name: arguments for name, *arguments in map(str.split, lines)}


def test_the_nine_runs_are_understood_and_differ_as_they_should():
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


def test_the_swept_rate_is_the_one_in_use():
    rates = re.search(
        r"for lr in (.*); do", (SCRIPTS / "skyline_sweep").read_text(encoding="utf-8")
    )
    assert rates is not None
    path = OVERLAYS / "organism" / "skyline.yaml"
    recorded = dict(re.findall(r"^# +(\S+) +(0\.\d+) +\d", path.read_text(encoding="utf-8"), re.M))
    assert list(recorded) == rates[1].split()
    best = min(recorded, key=lambda rate: float(recorded[rate]))
    assert read_yaml(path)["optimizer"]["lr"] == float(best)


def test_those_that_are_named_are_trained(tmp_path):
    program = tmp_path / "fastadapt"
    program.write_text(
        "#!/bin/bash\necho 'The adapter recovers 1%'\n"
        'while [ "$1" != --run.output ]; do shift; done\n'
        'mkdir -p "$2" && touch "$2/summary.json"\n'
    )
    program.chmod(0o755)
    command = [SCRIPTS / "runs", tmp_path / "runs", "1", "sparsity-4.3e-3", "norms"]
    environment = {**os.environ, "FASTADAPT": str(program)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    trained = {path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()}
    assert trained == {"sparsity-4.3e-3", "norms"}
    # `make study` trains one of them, of the same configuration.
    studied = re.search(r"^STUDIED := (\S+)$", (SCRIPTS.parent / "Makefile").read_text(), re.M)
    assert studied is not None
    assert studied[1] in runs()


@pytest.mark.slow
def test_they_run_go_on_and_do_not_repeat(tmp_path):
    program = tmp_path / "fastadapt"
    options = "--optimizer.max_steps 2 --run.eval_every 0 --data.max_validation 2"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m fastadapt "$@" {options}\n')
    program.chmod(0o755)
    environment = {**os.environ, "FASTADAPT": str(program), "OMP_NUM_THREADS": "1"}
    command = [SCRIPTS / "runs", tmp_path / "runs", "2"]
    for again in (False, True):
        if again:  # one is not finished
            (tmp_path / "runs" / "norms" / "summary.json").unlink()
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
        assert done.returncode == 0, done.stderr
        assert len(re.findall(r"^[\w.-]+: The .* recovers? -?\d", done.stdout, re.M)) == 9
        logs = [(tmp_path / "runs" / f"{name}.log").read_text() for name in runs()]
        assert ["step 1/2" in log for log in logs] == [not again] * 9
    program.write_text("#!/bin/sh\necho 'error: no' >&2\nexit 2\n")
    failed = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert failed.returncode != 0
    assert "error: no" in failed.stderr
