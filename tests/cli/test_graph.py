"""Output and errors of `fastadapt graph`."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from organism_runs import make_run

PROMPT = "tom has 3 apples"
SMALL = ("--nodes", 4, "--evidence.ablations", 4, "--evidence.copies", 4, "--device", "cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("graph") / "run")


def test_a_graph_and_its_tables(run: Path, fastadapt: Callable[..., Any]) -> None:
    outcome = fastadapt("graph", run, PROMPT, "--token", "4", "--against", "5", *SMALL)
    assert outcome.code == 0, outcome.err
    (file,) = (run / "graphs").glob("*.json")
    document = json.loads(file.read_text())
    account = document["account"]
    change = account["with_adapters"] - account["hybrid"]
    parts = ("features", "decoder_biases", "errors", "coefficients", "remainder")
    assert change == pytest.approx(sum(account[name] for name in parts))
    assert abs(account["remainder"]) < 1e-5 * document["rows"][0]["size"]
    last = len(document["ids"]) - 1
    assert f"logit of ' 4' - ' 5' after ' apples' (position {last})" in outcome.out
    for head in ("through heads", "difference: features", "strongest paths", "Spearman"):
        assert head in outcome.out
    assert re.search(
        r"\n  [\d.]+%: (token|feature|\w+ bias) .* (raises|lowers) the target\n", outcome.out
    )
    for sample in ("strongest", "random"):
        assert re.search(rf"4 {sample} +│ +graph ", outcome.out)
    assert str(file.resolve()) in outcome.out

    again = fastadapt("graph", run, PROMPT, "--token", "4", "--against", "5", *SMALL)
    assert again.code == 2
    assert "exists. Replace it (--overwrite)" in again.err
    for overwrite in ((), ("--overwrite",)):
        again = fastadapt("graph", run, PROMPT, *SMALL, "--output", run / "graphs", *overwrite)
        assert again.code == 2
        assert "graphs is a folder; expected a file" in " ".join(again.err.split())
    assert json.loads(file.read_text()) == document


def test_the_default_question(run: Path, tmp_path: Path, fastadapt: Callable[..., Any]) -> None:
    from fastadapt.evaluation.models_under_test import ModelSet
    from fastadapt.graphs.explain import token_ids
    from fastadapt.graphs.targets import most_different

    text = "<｜User｜>tom has 3 apples and gets 4 apples . how many now ?<｜Assistant｜><think>"
    path = tmp_path / "a.json"
    none = ("--nodes", 0, "--evidence.ablations", 0, "--device", "cpu", "--output", path)
    outcome = fastadapt("graph", run, text, *none)
    assert outcome.code == 0, outcome.err
    model = ModelSet.open([run], device="cpu").model
    place = most_different(model, token_ids(model, text))
    names = [repr(model.pair.tokenizer.decode([i])) for i in (place.token, place.against)]
    row = json.loads(path.read_text())["rows"][0]
    assert row["position"] == place.position
    for name in names:
        assert name.strip("' ") in row["name"]


def test_the_targets_own_text(run: Path, tmp_path: Path, fastadapt: Callable[..., Any]) -> None:
    path = tmp_path / "a.json"
    arguments = ("--feature", "3/2", "--stream", "target", "--output", path)
    outcome = fastadapt("graph", run, PROMPT, *arguments, *SMALL)
    assert outcome.code == 0, outcome.err
    document = json.loads(path.read_text())
    assert document["stream"] == "target"
    assert len(document["evidence"]["samples"]) == 2
    assert document["account"]["errors"] != 0


def test_what_graph_refuses(run: Path, tmp_path: Path, fastadapt: Callable[..., Any]) -> None:
    for arguments, reason in (
        (("--token", "xyzzy"), "expected one token of the vocabulary"),
        (("--nodes", -1), "--nodes: expected 0 or more, got -1"),
        (("--feature", "x"), "such as 2/17, got 'x'"),
        (("--stream", "base"), "--stream: expected one of replacement, target, ranks, got 'base'"),
        (("--stream", "ranks"), "--stream ranks: expected a target that is a PEFT folder"),
        (("--stability", 5), "--stability: expected 1 or more features, with --prompts"),
        (("--tokens", 5), "--tokens and --gpu go with --dry-run"),
        (("--dry-run", "--tokens", 5), "--dry-run: expected a prompt or --tokens"),
        (("--dry-run", "--gpu", "b100"), "--gpu: expected one of a100, h100, h200, got 'b100'"),
        (("--base_set", tmp_path), "--base_set: expected a folder with config.yaml"),
        (("--base_set", tmp_path, "--stream", "base"), "make it with circuit-tracer"),
    ):
        outcome = fastadapt("graph", run, PROMPT, *arguments, "--device", "cpu")
        assert outcome.code == 2
        assert reason in outcome.err
    assert fastadapt("graph", tmp_path, PROMPT).code == 2


def test_bad_runs_and_texts(run: Path, tmp_path: Path, fastadapt: Callable[..., Any]) -> None:
    from fastadapt.adapter.files import save_adapters
    from fastadapt.models.pair import ModelPair, PairConfig
    from fastadapt.models.replacement import ReplacementModel
    from fastadapt.organism import resolve

    outcome = fastadapt("graph", run, "4 " * 5000, "--token", "4", *SMALL)
    assert outcome.code == 2
    assert "expected at most 512 tokens, the model's context, got 5,000" in outcome.err
    target, base = (resolve(f"organism/{role}") for role in ("target", "base"))
    pair = ModelPair.load(PairConfig(target, base, device="cpu"))
    model = ReplacementModel.create(pair, "norms")
    card = {"target": "organism/target", "base": "organism/base"}
    save_adapters(model.adapters, tmp_path / "norms" / "adapter", card)
    for options in ((), ("--dry-run",)):
        outcome = fastadapt("graph", tmp_path / "norms", PROMPT, "--token", "4", *options)
        assert outcome.code == 2
        assert "graphs: expected a run with transcoders, got a baseline's" in outcome.err


def test_a_dry_run_reads_no_weights(
    run: Path, fastadapt: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(safetensors, "safe_open", refuse)
    outcome = fastadapt("graph", run, PROMPT, "--dry-run", "--device", "cpu", "--rows", 2)
    assert outcome.code == 0, outcome.err
    assert re.search(r"Peak: [\d.]+ [MG]B, in \w+, for 4 tokens with 3 active", outcome.out)
    assert re.search(r"would need [\d.]+ [MG]B instead of [\d.]+ [MG]B", outcome.out)
    assert "It fits into" in outcome.out
    outcome = fastadapt("graph", run, "--dry-run", "--tokens", 513, "--device", "cpu")
    assert "expected at most 512 tokens, the model's context, got 513" in outcome.err
    outcome = fastadapt(
        "graph", "r1-distill-qwen-7b", "--dry-run", "--tokens", 6000, "--gpu", "h100"
    )
    assert outcome.code == 0, outcome.err
    assert "It DOES NOT FIT into 76.00 GB of the 80.00 GB of NVIDIA H100 80GB" in outcome.out
    assert re.search(r"--rows 1 --evidence.copies 1 +│ +[67]\d\.\d\d GB", outcome.out)
    assert re.search(r"--rows 1 --evidence.copies 1 --token TOKEN +│ +4\d\.\d\d GB", outcome.out)


def test_the_targets_mlps_are_loaded_where_they_are_needed(
    run: Path, tmp_path: Path, fastadapt: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastadapt.models.pair import ModelPair

    loaded, load = [], ModelPair.load

    def spy(config: Any, **settings: Any) -> ModelPair:
        pair = load(config, **settings)
        loaded.append(any(True for _ in pair.target_mlps.parameters()))
        return pair

    monkeypatch.setattr(ModelPair, "load", spy)
    text = "<｜User｜>tom has 3 apples and gets 4 apples . how many now ?<｜Assistant｜><think>"
    small = ("--nodes", 1, "--evidence.ablations", 0, "--device", "cpu", "--output")
    for i, (options, needed) in enumerate(
        (
            (("--token", "4"), False),
            (("--feature", "3/2"), False),
            ((), True),
            (("--token", "4", "--stream", "target"), True),
        )
    ):
        outcome = fastadapt("graph", run, text, *options, *small, tmp_path / f"{i}.json")
        assert outcome.code == 0, outcome.err
        assert loaded.pop() == needed
        plan = fastadapt("graph", run, text, *options, "--dry-run", "--device", "cpu").out
        size = r"The target's own MLPs, [\d.]+ MB of the weights, are loaded"
        assert bool(re.search(size, plan)) == needed
        assert ("The target's own MLPs are not loaded" in plan) != needed


def test_stability_of_prompts(run: Path, tmp_path: Path, fastadapt: Callable[..., Any]) -> None:
    folder, out = tmp_path / "prompts", tmp_path / "out"
    folder.mkdir()
    for name, text in (("1", PROMPT), ("1.b", "tom gets 3 apples"), ("2", "so the answer is 7")):
        (folder / f"{name}.txt").write_text(text)
    none = ("--nodes", 2, "--evidence.ablations", 0, "--device", "cpu", "--output", out)
    ask = ("graph", run, "--prompts", folder, "--token", "4", "--stability", 3, *none)
    outcome = fastadapt(*ask)
    assert outcome.code == 0, outcome.err
    number = r"0(?:\.\d+)?|1"
    for name, pairs in (("same group", 1), ("other groups", 2)):
        row = rf"{name} +│ +{pairs} │ +(?:{number}) \[(?:{number}), (?:{number})\] "
        assert re.search(row, outcome.out), outcome.out
    path = Path(outcome.out.splitlines()[-1].removeprefix("stability: "))
    saved = json.loads(path.read_text())
    assert sorted(saved["graphs"].values()) == ["1", "1", "2"]
    assert [agreement["pairs"] for agreement in saved["agreements"]] == [1, 2]
    again = fastadapt(*ask)
    assert again.out.count("exists: ") == 3
    assert json.loads(path.read_text()) == saved


def write_base_set(folder: Path) -> None:
    """Write a transcoder set of the embedded pair's base with random weights."""
    import torch
    import yaml
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"model_name": "organism/base"}))
    for layer in range(4):
        tensors = {name: torch.randn(30, 128) * 0.1 for name in ("W_enc", "W_dec")}
        tensors |= {"b_enc": torch.zeros(30), "b_dec": torch.zeros(128)}
        save_file(tensors, folder / f"layer_{layer}.safetensors")


def test_a_base_set(run: Path, tmp_path: Path, fastadapt: Callable[..., Any]) -> None:
    write_base_set(tmp_path / "set")
    path = tmp_path / "a.json"
    ask = ("graph", run, PROMPT, "--token", "4", "--base_set", tmp_path / "set", "--output", path)
    outcome = fastadapt(*ask, *SMALL)
    assert outcome.code == 0, outcome.err
    assert outcome.out.index("fraction of variance unexplained") < outcome.out.index("logit of")
    document = json.loads(path.read_text())
    assert len(document["base_set"]["unexplained_variance"]) == 4
    assert {"feature", "base feature", "error"} <= {node["kind"] for node in document["nodes"]}
    assert document["rows"][0]["sums"]["base feature"] != 0
    assert fastadapt("graph", "export", path, "--format", "circuit-tracer").code == 0


def sampled(path: Path, n_prompt: int = 8) -> list[Any]:
    """Write texts of the embedded pair as a file of responses, and return the responses."""
    from fastadapt.data.batches import collate
    from fastadapt.data.sequences import DataConfig, load_sequences
    from fastadapt.evaluation.generation.responses import Response, open_responses
    from fastadapt.evaluation.models_under_test import ModelSet
    from fastadapt.organism import resolve

    tokenizer = ModelSet.open([path.parent / "run"], device="cpu").model.pair.tokenizer
    data = DataConfig("", resolve("organism/validation"), max_validation=6)
    texts = load_sequences(data.validation, tokenizer, data, split="validation")
    batch = collate(list(texts), 0)
    written = []
    with open_responses(path, {}) as file:
        for i, (ids, real) in enumerate(zip(batch.input_ids, batch.real, strict=True)):
            tokens = ids[real].tolist()
            answer = tokens[n_prompt:]
            written.append(
                Response(
                    str(i), 0, 0, tokens[:n_prompt], answer, tokenizer.decode(answer), "eos", None
                )
            )
            file.add(written[-1])
    return written


def test_places_in_responses(run: Path, fastadapt: Callable[..., Any]) -> None:
    file = run.parent / "responses.jsonl"
    responses = sampled(file)
    find = ("graph", run, "--responses", file, "--stream", "target", "--device", "cpu")
    outcome = fastadapt(*find, "--at", "wait", "so")
    assert outcome.code == 0, outcome.err
    assert f"places in {len(responses)} responses" in outcome.out
    assert not (run / "graphs").exists() or "graph: " not in outcome.out
    n_places = int(re.search(r"(\d+) places", outcome.out)[1])  # type: ignore[index]
    assert n_places > 0
    later = fastadapt(*find, "--at", "wait", "so", "--after", "wait")
    assert int(re.search(r"(\d+) places", later.out)[1]) < n_places  # type: ignore[index]

    small = ("--at", "wait", "so", "--place", "0", "--nodes", 2)
    first = fastadapt(*find, *small)
    assert first.code == 0, first.err
    path = Path(first.out.splitlines()[-1].removeprefix("graph: "))
    document = json.loads(path.read_text())
    position = len(document["ids"]) - 1
    assert document["rows"][0]["position"] == position
    assert document["logits"][0][0]["string"].strip() in ("wait", "so")
    again = fastadapt(*find, *small)
    assert again.code == 0
    assert again.out.splitlines()[-1] == f"exists: {path}"

    for options, reason in (
        (("--at", "xyzzy"), "expected words that are tokens of the vocabulary, got ['xyzzy']"),
        (("--at", "so", "--place", "999"), "numbered from 0; expected such numbers, or all"),
        (("--at", "so", "--above", "2"), "--above: expected more than 0 and at most 1, got 2"),
        (("--at", "so", "--token", "4"), "--responses: the chosen place gives the token"),
        ((), "--at: expected one or more words"),
    ):
        outcome = fastadapt(*find, *options)
        assert outcome.code == 2
        assert reason in outcome.err
    outcome = fastadapt("graph", run, PROMPT, "--at", "wait")
    assert "--at, --above, --after and --place go with --responses" in outcome.err
    outcome = fastadapt("graph", run, PROMPT, "--responses", file)
    assert "expected one of PROMPT, --prompts, --responses" in outcome.err


def test_a_folder_of_prompts(run: Path, tmp_path: Path, fastadapt: Callable[..., Any]) -> None:
    folder, out = tmp_path / "prompts", tmp_path / "out"
    folder.mkdir()
    none = ("--nodes", 1, "--evidence.ablations", 0, "--device", "cpu", "--output", out)
    ask = ("graph", run, "--prompts", folder, "--token", "4", *none)
    assert "expected a folder with .txt files" in fastadapt(*ask).err
    (folder / "a.txt").write_text(PROMPT + "\n")
    assert fastadapt(*ask).out.count("graph: ") == 1
    (folder / "b.txt").write_text("tom has 5 apples")
    outcome = fastadapt(*ask)
    assert outcome.code == 0, outcome.err
    assert (outcome.out.count("exists: "), outcome.out.count("graph: ")) == (1, 1)
    assert len(list(out.glob("*.json"))) == 2


def test_existing_graphs_of_other_adapters_are_refused(
    run: Path, tmp_path: Path, fastadapt: Callable[..., Any]
) -> None:
    folder, out = tmp_path / "prompts", tmp_path / "out"
    folder.mkdir()
    (folder / "1.txt").write_text(PROMPT)
    (folder / "1.b.txt").write_text("tom gets 3 apples")
    other = make_run(tmp_path / "other", seed=1)
    none = ("--token", "4", "--nodes", 1, "--evidence.ablations", 0, "--device", "cpu")
    options = ("--prompts", folder, "--output", out, *none)
    assert fastadapt("graph", run, *options).code == 0
    for more in ((), ("--stability", 3)):
        outcome = fastadapt("graph", other, *options, *more)
        assert outcome.code == 2
        assert "exists" not in outcome.out
        assert "Jaccard" not in outcome.out
        assert "2 texts have no graph of this call" in outcome.err
        for name in ("1.b.txt", "1.txt"):
            line = rf"{name}: {out}/\w+\.json exists, but is of other adapters than those of "
            assert re.search(line, outcome.err)
        assert "Replace it (--overwrite), or give another --output" in outcome.err
    # A run that was trained again beside its graphs.
    shutil.copytree(run, tmp_path / "again", ignore=shutil.ignore_patterns("graphs"))
    again = ("graph", tmp_path / "again", "--prompts", folder, *none)
    assert fastadapt(*again).code == 0
    assert fastadapt(*again).out.count("exists: ") == 2
    shutil.copytree(other / "adapter", tmp_path / "again" / "adapter", dirs_exist_ok=True)
    assert "is of other adapters" in fastadapt(*again).err
    assert fastadapt(*again, "--overwrite").code == 0
    assert fastadapt(*again).out.count("exists: ") == 2
    (graph, _) = sorted((tmp_path / "again" / "graphs").glob("*.json"))
    graph.write_text("{")
    assert re.search("is not valid JSON.* Replace it", fastadapt(*again).err)


def test_existing_graphs_without_the_ablations_are_refused(
    run: Path, tmp_path: Path, fastadapt: Callable[..., Any]
) -> None:
    (tmp_path / "1.txt").write_text(PROMPT)
    ask = ("graph", run, "--prompts", tmp_path, "--output", tmp_path / "out", "--token", "4")
    small = (*ask, "--nodes", 1, "--device", "cpu", "--evidence.ablations")
    assert fastadapt(*small, 0).code == 0
    outcome = fastadapt(*small, 4)
    assert (outcome.code, "has fewer ablations than 4. Replace" in outcome.err) == (2, True)
    assert fastadapt(*small, 4, "--overwrite").code == 0
    assert fastadapt(*small, 5).code == 2
    assert fastadapt(*small, 1000, "--overwrite").code == 0
    for fewer in (0, 5, 1000, 2000):  # the text has fewer features than 1,000
        assert fastadapt(*small, fewer).out.startswith("exists: ")


def test_existing_graphs_of_other_files_are_refused(
    run: Path, tmp_path: Path, fastadapt: Callable[..., Any]
) -> None:
    import torch
    from safetensors.torch import save_file

    (tmp_path / "1.txt").write_text(PROMPT)
    none = ("--nodes", 1, "--evidence.ablations", 0, "--device", "cpu", "--output", tmp_path / "o")
    direction, base_set = tmp_path / "d.safetensors", tmp_path / "set"
    save_file({"direction": torch.ones(128)}, direction)
    write_base_set(base_set)
    cases: tuple[tuple[tuple[Any, ...], Path], ...] = (
        (("--direction", direction), direction),
        (("--token", "4", "--base_set", base_set), base_set / "layer_1.safetensors"),
    )
    for options, changed in cases:
        ask = ("graph", run, "--prompts", tmp_path, *options, *none)
        assert fastadapt(*ask).code == 0
        assert fastadapt(*ask).out.startswith("exists: ")
        changed.write_bytes(changed.read_bytes()[:-1] + b"\x01")
        outcome = fastadapt(*ask)
        assert outcome.code == 2
        assert "a --direction or a --base_set whose files had other contents" in outcome.err
        (written,) = [path for path in (tmp_path / "o").glob("*.json") if path.name in outcome.err]
        document = json.loads(written.read_text())
        del document["files"]  # as versions before wrote
        written.write_text(json.dumps(document))
        assert fastadapt(*ask).out.startswith("exists: ")
    prompts: tuple[tuple[Any, ...], ...] = (("--prompts", tmp_path), (PROMPT,))
    for prompt in prompts:
        options = ("--token", "4", "--base_set", tmp_path / "none", *none[:-1], tmp_path / "b.json")
        missing = fastadapt("graph", run, *prompt, *options)
        assert (missing.code, "expected a folder with config.yaml" in missing.err) == (2, True)


def test_a_prompt_without_a_graph_does_not_end_the_others(
    run: Path, tmp_path: Path, fastadapt: Callable[..., Any]
) -> None:
    folder, out = tmp_path / "prompts", tmp_path / "out"
    folder.mkdir()
    for name, text in (("1", "tom"), ("2", PROMPT), ("3", ""), ("4", "tom"), ("5", PROMPT + " .")):
        (folder / f"{name}.txt").write_text(text)
    small = ("--prompts", folder, "--device", "cpu", "--nodes", 1, "--output", out)
    none = (*small, "--evidence.ablations", 0)
    outcome = fastadapt("graph", run, "--token", "4", "--position", 3, "--stability", 3, *none)
    assert outcome.code == 2
    assert outcome.out.count("graph: ") == 2
    assert "Jaccard" not in outcome.out
    assert "3 texts have no graph of this call:\n1.txt, 4.txt: --position: expected" in outcome.err
    assert "\n3.txt: prompt: expected a text, got ''" in outcome.err
    assert len(list(out.iterdir())) == 2
    outcome = fastadapt("graph", run, "--feature", "0/2", *small)
    assert "1.txt, 2.txt, 4.txt, 5.txt: evidence: expected 3 or more features" in outcome.err
    # Errors of the run are not those of its texts.
    outcome = fastadapt("graph", tmp_path, *none)
    assert "no graph of this call" not in outcome.err
    assert outcome.err.count("expected a run") == 1


def test_a_place_without_a_graph_does_not_end_the_others(
    run: Path, tmp_path: Path, fastadapt: Callable[..., Any]
) -> None:
    file = run.parent / "sampled.jsonl"
    sampled(file)
    find = ("graph", run, "--responses", file, "--stream", "target", "--device", "cpu")
    few = ("--at", "wait", "so", "--nodes", 1, "--evidence.ablations", 0, "--output", tmp_path)
    n = int(re.search(r"(\d+) places", fastadapt(*find, *few).out)[1])  # type: ignore[index]
    outcome = fastadapt(*find, *few, "--place", "all", "--against", " so")
    n_graphs = outcome.out.count("graph: ")
    assert (outcome.code, 0 < n_graphs < n) == (2, True)
    refused = re.search(r"error: (\d+) texts? ha.* no graph of this call:\nplace \d", outcome.err)
    assert refused is not None
    assert int(refused[1]) == n - n_graphs
    assert "--against: expected another token than --token" in outcome.err


def test_one_newline_at_the_end_of_a_prompt_is_the_files(
    run: Path, tmp_path: Path, fastadapt: Callable[..., Any]
) -> None:
    for i, end in enumerate((b"", b"\n", b"\r\n", b"\n\n")):
        (tmp_path / f"{i}.txt").write_bytes(b"<think>" + end)
    none = ("--token", "4", "--nodes", 0, "--evidence.ablations", 0, "--device", "cpu")
    outcome = fastadapt("graph", run, "--prompts", tmp_path, "--output", tmp_path / "out", *none)
    assert outcome.code == 0, outcome.err
    # The first three texts are equal, the last one has a newline of its own.
    results = re.findall("^(graph|exists): ", outcome.out, re.MULTILINE)
    assert results == ["graph", "exists", "exists", "graph"]


def test_what_cannot_be_measured_is_refused_before_the_work(
    run: Path, tmp_path: Path, fastadapt: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_base_set(tmp_path / "set")
    out = tmp_path / "out"
    out.mkdir()
    ask = ("--device", "cpu", "--nodes", 1, "--output", out / "a.json")
    layer_0, none = ("--feature", "0/2"), ("--evidence.ablations", 0)
    base_set = ("--token", "4", "--base_set", tmp_path / "set", *none)
    for prompt, options, reason in (
        (PROMPT, layer_0, "give --evidence.ablations 0 for a graph without ablations"),
        ("tom", base_set, "expected tokens that differ in the output of the base's MLP"),
        ("tom tom tom", base_set, "got 3 with equal ones, so no variance to explain"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr("fastadapt.graphs.explain.grow", None)
            outcome = fastadapt("graph", run, prompt, *options, *ask)
        assert outcome.code == 2
        assert reason in outcome.err
        assert list(out.iterdir()) == []
    assert fastadapt("graph", run, PROMPT, *layer_0, *none, *ask).code == 0
