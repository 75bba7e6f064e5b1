"""The memory plan of `fastadapt graph --dry-run`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastadapt.graphs.evidence import EvidenceConfig
    from fastadapt.graphs.explain import Question
    from fastadapt.graphs.graph import GraphConfig
    from fastadapt.graphs.linear.trace import Stream
    from fastadapt.graphs.memory import GraphMemory, GraphSetup
    from fastadapt.training.planning.devices import Device

#: Active features per token and layer, assumed where a run has no measurement.
L0 = 10.0


def print_plan(
    run: str,
    tokens: int | None,
    prompt: str | None,
    *,
    stream: Stream,
    question: Question | None,
    dtype: str,
    gpu: str | None,
    device: str | None,
    trust_remote_code: bool,
    config: GraphConfig,
    evidence: EvidenceConfig,
) -> None:
    """Print the memory that a graph needs. The arguments are those of `fastadapt graph`.

    Args:
        question: what to explain; None: tokens at places in responses.

    Raises:
        UserError: no run or recipe, or neither a prompt nor its length.
    """
    from fastadapt.cli.console import print_table
    from fastadapt.graphs.memory import graph_memory
    from fastadapt.training.planning.estimate import gb

    place = _device(gpu, device)
    setup = _setup(run, tokens, prompt, stream, question, dtype, trust_remote_code)
    setup = replace(setup, config=config, evidence=evidence)
    memory = graph_memory(setup)
    for title, sizes in (
        ("device memory, by part", memory.parts),
        ("by phase", memory.phases),
        ("host memory, by part", memory.host),
    ):
        print_table([title, "at most"], [[name, gb(size)] for name, size in sizes.items()])
        print()
    total = memory.peak_bytes + (memory.host_bytes if place.kind == "cpu" else 0)
    peak = max(memory.phases, key=lambda name: memory.phases[name])
    print(
        f"Peak: {gb(memory.peak_bytes)}, in {peak}, for {setup.tokens:,} tokens with "
        f"{setup.l0:.3g} active features per token and layer; host: {gb(memory.host_bytes)}."
    )
    by_question = stream == "replacement" and setup.target_mlps and memory.target_mlps > 0
    print(_target_mlps(stream, by_question, memory))
    print(
        "Without running blocks again, the edges would need "
        f"{gb(memory.without_recompute)} instead of {gb(memory.phases['edges'])}."
    )
    fits = "fits" if total <= place.usable_bytes else "DOES NOT FIT"
    print(
        f"It {fits} into {gb(place.usable_bytes)} of the {gb(place.memory_bytes)} of {place.name}."
    )
    if total > place.usable_bytes and (smaller := _remedies(setup, memory, by_question)):
        print_table(["with", "peak"], [[name, gb(size)] for name, size in smaller])


def _target_mlps(stream: Stream, by_question: bool, memory: GraphMemory) -> str:
    """Return a sentence that says whether the target's own MLPs are loaded, and why."""
    from fastadapt.training.planning.estimate import gb

    if not memory.target_mlps:
        return "The target's own MLPs are not loaded: this graph does not need them."
    size = f"The target's own MLPs, {gb(memory.target_mlps)} of the weights, are loaded for"
    if not by_question:
        return f"{size} --stream {stream}."
    return f"{size} the default question; with --token, --feature or --direction they are not."


def _device(gpu: str | None, device: str | None) -> Device:
    import torch

    from fastadapt.errors import UserError
    from fastadapt.training.planning.devices import DATA_SHEETS, Device, this_device

    if gpu is None:
        kind = "cuda" if torch.cuda.is_available() and device != "cpu" else "cpu"
        return this_device(kind)
    if gpu.lower() not in DATA_SHEETS:
        raise UserError(f"--gpu: expected one of {', '.join(DATA_SHEETS)}, got {gpu!r}")
    name, memory, _ = DATA_SHEETS[gpu.lower()]
    return Device(name, "cuda", memory, float("nan"), "data sheet")


def _setup(
    run: str,
    tokens: int | None,
    prompt: str | None,
    stream: Stream,
    question: Question | None,
    dtype: str,
    trust_remote_code: bool,
) -> GraphSetup:
    """Read configurations of the models and the adapters; no weights."""
    from fastadapt.adapter.files import adapters_of
    from fastadapt.adapter.module import AdapterConfig
    from fastadapt.cli.train import find_config
    from fastadapt.errors import UserError
    from fastadapt.evaluation.runs import read_pair, with_trust
    from fastadapt.graphs.explain import check_dtype, needs_target_mlps
    from fastadapt.graphs.memory import GraphSetup
    from fastadapt.io.documents import read_yaml
    from fastadapt.io.names import typed_path
    from fastadapt.models.pretrained import encode_text
    from fastadapt.models.sources.pair_sources import Sources, planned_config
    from fastadapt.models.trained_files import read_adapters
    from fastadapt.training.config import from_dict

    check_dtype(dtype)
    l0 = L0
    if typed_path(run, "run").is_dir():
        folder = adapters_of(run)
        card = read_adapters(folder)[1]
        pair = with_trust(read_pair(folder, card["metadata"]), folder, trust_remote_code)
        adapter = card.get("adapter")
        l0 = (card["metadata"].get("measured") or {}).get("l0_mean", L0)
    else:
        recipe = from_dict(read_yaml(find_config(run), dict[str, Any]))
        pair, adapter = recipe.pair, recipe.trained
    if not isinstance(adapter, AdapterConfig):
        raise UserError("graphs: expected a run with transcoders, got a baseline's trained weights")
    sources = Sources.find(pair)
    if (tokens is None) == (prompt is None):
        got = "neither" if prompt is None else "both"
        raise UserError(f"--dry-run: expected a prompt or --tokens, its length, got {got}")
    if tokens is None:
        assert prompt is not None
        tokens = len(encode_text(sources.tokenizer(), prompt))
    if tokens < 1:
        raise UserError(f"--tokens: expected 1 or more, got {tokens}")
    target = sources.configs(planned_config)[0]
    if tokens > (context := target.max_position_embeddings):
        what, fewer = ("--tokens", "fewer") if prompt is None else ("prompt", "a shorter text")
        raise UserError(
            f"{what}: expected at most {context:,} tokens, the model's context, got {tokens:,}; "
            f"give {fewer}"
        )
    needed = needs_target_mlps(stream, question) or not sources.has_separate_mlps
    pair = replace(pair, dtype=dtype)
    return GraphSetup(target, pair, adapter, tokens, l0, stream, target_mlps=needed)


def _remedies(setup: GraphSetup, memory: GraphMemory, by_question: bool) -> list[tuple[str, int]]:
    """Return settings that lower the peak, each with its peak, the lowest peak first."""
    from fastadapt.graphs.memory import graph_memory

    config, evidence = setup.config, setup.evidence
    one_row = replace(config, rows=1)
    few = replace(evidence, copies=1)
    none = replace(evidence, ablations=0)
    tried = {
        "--rows 1": replace(setup, config=one_row),
        "--rows 1 --evidence.copies 1": replace(setup, config=one_row, evidence=few),
        "--rows 1 --evidence.ablations 0": replace(setup, config=one_row, evidence=none),
    }
    if by_question:
        for name in list(tried):
            tried[f"{name} --token TOKEN"] = replace(tried[name], target_mlps=False)
    peaks = {name: graph_memory(changed).peak_bytes for name, changed in tried.items()}
    return sorted(
        ((name, size) for name, size in peaks.items() if size < memory.peak_bytes),
        key=lambda item: item[1],
    )
