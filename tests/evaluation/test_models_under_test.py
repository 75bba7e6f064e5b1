"""Opening of runs, and the compared models that they give."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastadapt.cli.train import find_config
from fastadapt.errors import UserError
from fastadapt.evaluation.benchmarks.run_all import complete_config
from fastadapt.evaluation.benchmarks.runner import PUBLISHED, BenchmarkConfig
from fastadapt.evaluation.comparison import alike
from fastadapt.evaluation.generation.sampling import SamplingConfig
from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.evaluation.runs import ComparedModel
from fastadapt.training.config import load_config, to_dict

IDS = torch.tensor([[5, 9, 23, 7, 31, 8]])


def test_each_name_gives_its_model(make_run: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    models = ModelSet.open([make_run("a", 1), make_run("b", 2)])
    assert list(models.compared) == ["base", "hybrid", "a", "b"]
    assert models.runs == ["a", "b"]
    logits = {}
    with torch.no_grad():
        for name in ("target", "base", "hybrid", "a", "b"):
            with models.generating(name) as model:
                logits[name] = model(IDS).logits
                assert model.generate(IDS, max_new_tokens=2).shape == (1, 8)
        for role in ("target", "base"):
            plain = AutoModelForCausalLM.from_pretrained(getattr(models.config, role))
            assert torch.equal(logits[role], plain(IDS).logits)
        for name in ("a", "b"):
            model = models.replacement(name)
            assert torch.equal(model(IDS).logits, logits[name])
            assert model.adapters is models.adapters(name)
    values = list(logits.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


def test_the_base_shares_its_mlps_and_adapters_are_restored(make_run: Callable[..., Path]) -> None:
    models = ModelSet.open([make_run("a", 1), make_run("b", 2)])
    before = models.model.adapters
    with models.generating("b"), models.base() as base:
        assert models.model.adapters is models.adapters("b")
        shared = [layer.mlp for layer in base.model.layers]
        assert all(m is n for m, n in zip(shared, models.model.pair.base_mlps, strict=True))
    assert models.model.adapters is before
    with pytest.raises(RuntimeError, match="inside"), models.generating("b"):
        raise RuntimeError("inside")
    assert models.model.adapters is before
    assert not any(p.requires_grad for p in models.adapters("a").parameters())


def test_facts_of_a_run(make_run: Callable[..., Path]) -> None:
    facts = {
        "objective": {"sparsity": 0.01, "bridge": 0.0},
        "measured": {"l0_mean": 3.5, "tokens": 1000},
    }
    run = make_run("a", 1, **facts)
    models = ModelSet.open([run, run / "adapter"], ["one", "two"])
    facts_of_one = asdict(models.compared["one"])
    assert len(facts_of_one.pop("recipe")) == 64  # a digest of the settings beside the seed
    assert facts_of_one == {
        "name": "one",
        "kind": "transcoder",
        "run": str(run),
        "sparsity": 0.01,
        "bridge": 0.0,
        "l0": 3.5,
        "tokens": 1000,
        "changed": (),
        "seed": None,
        "whole_mlp": False,
        "activation": "relu",
        "k": None,
        "penalty": "l1",
        "penalty_scale": None,
    }
    assert models.family == "r1-distill"
    assert models.compared["hybrid"].kind == "hybrid"
    assert models.config.dtype == "float32"
    assert ModelSet.open([run], dtype="bfloat16", device="cpu").config.dtype == "bfloat16"


def test_the_sparsity_of_a_steered_run_is_that_of_its_end(make_run: Callable[..., Path]) -> None:
    facts = {
        "objective": {"sparsity": 0.01, "l0": 3.0},
        "measured": {"l0_mean": 3.1, "sparsity_weight": 0.0271828},
    }
    model = ModelSet.open([make_run("a", 1, **facts)], ["one"]).compared["one"]
    assert (model.sparsity, model.description) == (0.0271828, "adapter, λ=0.0272")


@pytest.mark.parametrize(
    ("facts", "description", "variant"),
    [
        ({"activation": "topk", "k": 4, "sparsity": 0.0}, "adapter, topk k=4", ""),
        (
            {"activation": "batch_topk", "k": 2.5, "sparsity": 0.0, "bridge": 0.0},
            "adapter, batch_topk k=2.5, no bridge",
            "no-bridge",
        ),
        ({"activation": "jumprelu", "sparsity": 0.1}, "adapter, jumprelu, λ=0.1", ""),
        ({"penalty": "tanh", "sparsity": 0.1}, "adapter, tanh, λ=0.1", ""),
        ({"sparsity": 0.0, "bridge": 0.0}, "adapter, λ=0", "dense"),
        ({"sparsity": 0.1, "bridge": 0.0}, "adapter, λ=0.1, no bridge", "no-bridge"),
    ],
)
def test_transcoders_are_described_by_what_makes_them_sparse(
    facts: dict[str, Any], description: str, variant: str
) -> None:
    model = ComparedModel("run", "transcoder", **facts)
    assert (model.description, model.variant) == (description, variant)


def test_runs_of_another_k_are_not_alike() -> None:
    four = ComparedModel("four", "transcoder", sparsity=0.0, k=4, l0=4.0)
    assert alike(four, replace(four, name="again"))
    assert not alike(four, replace(four, k=8, l0=8.0))
    assert not alike(four, ComparedModel("dense", "transcoder", sparsity=0.0, l0=111.0))
    for other in ({"activation": "batch_topk"}, {"penalty": "tanh"}, {"penalty_scale": 2.0}):
        assert not alike(four, replace(four, **other))


def test_runs_of_an_older_version_group_with_those_of_this_one(
    make_run: Callable[..., Path],
) -> None:
    """Settings that did not exist then have their defaults."""
    runs = [make_run(name, 1) for name in ("old", "new")]
    values = to_dict(load_config(find_config("organism")))
    for role in ("target", "base"):
        values["pair"][role] = str(runs[0].parent / f"qwen2-{role}")
    for seed, run in enumerate(runs):
        values["run"]["seed"] = seed
        (run / "config.yaml").write_text(yaml.safe_dump(values))
    old = yaml.safe_load((runs[0] / "config.yaml").read_text())
    del old["objective"]["penalty"], old["objective"]["penalty_scale"]
    (runs[0] / "config.yaml").write_text(yaml.safe_dump(old))
    a, b = (ModelSet.open([run], ["one"]).compared["one"].recipe for run in runs)
    assert a == b
    old["objective"]["kl"] = 7.0
    (runs[0] / "config.yaml").write_text(yaml.safe_dump(old))
    assert ModelSet.open([runs[0]], ["one"]).compared["one"].recipe != b


def test_fingerprints_depend_on_models_and_adapters(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run, other = make_run("a", 1), make_run("b", 2)
    shutil.copytree(run, tmp_path / "copy")
    models = ModelSet.open([run, other, tmp_path / "copy"])
    digests = {name: models.fingerprint(name) for name in models.compared}
    assert digests["a"] == digests["copy"] != digests["b"]
    assert digests["base"] == digests["hybrid"] != digests["a"]
    assert ModelSet.open([run]).fingerprint("a") == digests["a"]
    assert ModelSet.open([run], dtype="bfloat16").fingerprint("a") != digests["a"]
    file = run / "adapter" / "layer_1.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert models.fingerprint("a") != digests["a"]
    file = Path(models.config.target) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert models.fingerprint("b") != digests["b"]
    assert models.fingerprint("hybrid") != digests["hybrid"]


def test_bad_runs(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run("a", 1)
    with pytest.raises(UserError, match="at least one run"):
        ModelSet.open([])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: expected a run or a folder of adapters"):
        ModelSet.open([tmp_path / "empty"])
    (tmp_path / "empty" / "config.yaml").write_text("pair: {}")
    with pytest.raises(UserError, match="this run is not finished: it has no adapter/ yet"):
        ModelSet.open([run, tmp_path / "empty"])
    other = make_run("b", 2, "llama")
    with pytest.raises(UserError, match=r"b: expected a run of the pair of .*qwen2-target .*llama"):
        ModelSet.open([run, other])
    shutil.copy(other / "config.yaml", run / "config.yaml")
    with pytest.raises(UserError, match=r"expected adapters of .*llama.*got adapters of .*qwen2"):
        ModelSet.open([run])
    (run / "config.yaml").write_text("[")
    with pytest.raises(UserError, match=r"config\.yaml: expected the configuration that"):
        ModelSet.open([run])


def test_bad_names_and_dtypes(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run, other = make_run("a", 1), make_run("b", 2)
    with pytest.raises(UserError, match=r"several runs have the name 'a' .*pass --names"):
        ModelSet.open([run, run])
    with pytest.raises(UserError, match="'hybrid' is already the name of a model"):
        ModelSet.open([run], ["hybrid"])
    with pytest.raises(UserError, match=r"letters, digits and \._-\+=, .*got '\.\./x'"):
        ModelSet.open([run], ["../x"])
    with pytest.raises(UserError, match="as many names as runs, got 1 for 2"):
        ModelSet.open([run, other], ["x"])
    with pytest.raises(UserError, match="run 'c': expected one of a, b"):
        ModelSet.open([run, other]).adapters("c")
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["pair"]["dtype"] = "bfloat16"
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"expected a pair in float32, as in .*, got bfloat16"):
        ModelSet.open([run, other])
    assert ModelSet.open([run, other], dtype="float32").runs == ["a", "b"]


def test_the_family_is_not_guessed(make_run: Callable[..., Path]) -> None:
    models = ModelSet.open([make_run("a", family=None)])
    with pytest.raises(UserError, match=r"benchmarks: no chat format recorded in a;"):
        complete_config(models, BenchmarkConfig(), SamplingConfig())
    models, sampling = ModelSet.open([make_run("b")]), SamplingConfig(seed=3)
    config = complete_config(models, BenchmarkConfig(), sampling)
    assert (config.family, config.tasks, config.sampling.seed) == ("r1-distill", PUBLISHED, 3)
