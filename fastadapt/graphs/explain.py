"""From a run and a prompt to a graph's document: target, expansion, account, heads, evidence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastadapt.adapter.files import adapter_digest
from fastadapt.errors import UserError
from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.features.store.logit_lens import token_strings
from fastadapt.graphs.attribution import Leaves, Target
from fastadapt.graphs.evidence import (
    EvidenceConfig,
    ablation_candidates,
    account,
    measure_evidence,
)
from fastadapt.graphs.files import describe
from fastadapt.graphs.graph import Graph, GraphConfig, grow
from fastadapt.graphs.linear.heads import head_loadings
from fastadapt.graphs.linear.overlay import TranscoderSet, unexplained_variance
from fastadapt.graphs.linear.trace import Stream, Trace, check_ids, record
from fastadapt.graphs.schema import BaseSet, GraphFile, Heads
from fastadapt.graphs.targets import (
    contrast,
    direction_of,
    logit,
    most_different,
    named_feature,
    one_token,
)
from fastadapt.graphs.unfinished import Batches
from fastadapt.models.pretrained import encode_text
from fastadapt.models.replacement import ReplacementModel

HEADS = 10  # edges of the first target that are split by heads


@dataclass(frozen=True)
class Question:
    """What a graph explains; by default the target's top token against the hybrid's.

    Args:
        token: a token, as text or id: its logit, minus the mean over the vocabulary.
        against: with ``token``: the difference to this token's logit.
        feature: ``layer/number``: the pre-activation of this feature.
        direction: a safetensors file with a tensor ``direction`` of the model's width, which is
            applied to the state after the final norm.
        position: index of the token to explain, from 0. By default the last one; for the default
            question, the one at which target and hybrid differ most.

    Raises:
        UserError: more than one of ``token``, ``feature`` and ``direction``, or ``against`` without
            ``token``.
    """

    token: str | int | None = None
    against: str | int | None = None
    feature: str | None = None
    direction: str | None = None
    position: int | None = None

    def __post_init__(self) -> None:
        names = ("token", "feature", "direction")
        given = [f"--{name}" for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(
                "expected at most one of --token, --feature, --direction, got " + ", ".join(given)
            )
        if self.against is not None and self.token is None:
            raise UserError("--against: expected with --token; give --token too")

    @property
    def is_default(self) -> bool:
        """Whether the question is the default one, which compares the target with the hybrid."""
        return self.token is None and self.feature is None and self.direction is None

    def target(self, trace: Trace) -> Target:
        """Return the question's target on a traced text.

        Raises:
            UserError: the position is not in the text, a token is not in the vocabulary, or target
                and hybrid agree where the default question looks for a difference.
        """
        n_tokens, tokenizer = trace.n_tokens, trace.model.pair.tokenizer
        if self.position is not None and not 0 <= self.position < n_tokens:
            raise UserError(
                f"--position: expected 0 to {n_tokens - 1}, the tokens of the prompt, got "
                f"{self.position}"
            )
        last = n_tokens - 1 if self.position is None else self.position
        if self.direction is not None:
            return direction_of(trace, self.direction, last)
        if self.feature is not None:
            return named_feature(trace, self.feature, last)
        if self.is_default:
            place = most_different(trace.model, trace.ids, self.position)
            a, b, last = place.token, place.against, place.position
        else:
            assert self.token is not None
            a = one_token(tokenizer, self.token, "--token")
            if self.against is None:
                return logit(trace, a, last, f"logit of {_quoted(trace.model, a)}")
            b = one_token(tokenizer, self.against, "--against")
        name = f"logit of {_quoted(trace.model, a)} - {_quoted(trace.model, b)}"
        return contrast(trace, a, b, last, name)


def _quoted(model: ReplacementModel, token: int) -> str:
    return repr(token_strings(model.pair.tokenizer, token + 1)[token])


def token_ids(model: ReplacementModel, prompt: str) -> Tensor:
    """Return the ids ``[T]`` of a prompt, with the special tokens that the tokenizer adds.

    Raises:
        UserError: the prompt has no tokens, or more than the model can read.
    """
    ids = encode_text(model.pair.tokenizer, prompt)
    if not ids:
        raise UserError(f"prompt: expected a text, got {prompt!r}, which has no tokens")
    return check_ids(model, ids)


def check_dtype(dtype: str) -> None:
    """Check that a dtype is precise enough for edges to sum to the value that they explain.

    Raises:
        UserError: it has 16 bits.
    """
    if dtype not in ("float32", "float64"):
        raise UserError(
            f"--dtype: expected float32 or float64, got {dtype}; in 16 bits the edges do not "
            "sum to the value"
        )


def needs_target_mlps(stream: Stream, question: Question | None) -> bool:
    """Return whether a graph needs the target's own MLPs.

    A graph of the replacement runs the base's MLPs alone, in its account and its ablations too.

    Args:
        stream: whose states are explained.
        question: what is explained; None: tokens at places in responses.
    """
    return stream != "replacement" or (question is not None and question.is_default)


def open_models(
    run: str,
    *,
    dtype: str = "float32",
    device: str | None = None,
    trust_remote_code: bool = False,
    target_mlps: bool = True,
) -> ModelSet:
    """Open a run for graphs; arguments as of :func:`explain`.

    Args:
        run: folder of a finished run with transcoders.
        dtype, device, trust_remote_code: settings of the pair.
        target_mlps: load the target's own MLPs, see :func:`needs_target_mlps`.

    Raises:
        UserError: the run is none, or the dtype has 16 bits.
    """
    check_dtype(dtype)
    return ModelSet.open(
        [run],
        ["run"],
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        target_mlps=target_mlps,
    )


def explain(
    run: str | ModelSet,
    prompt: str | Sequence[int],
    question: Question,
    config: GraphConfig,
    evidence: EvidenceConfig,
    *,
    stream: Stream = "replacement",
    overlay: TranscoderSet | None = None,
    dtype: str = "float32",
    device: str | None = None,
    trust_remote_code: bool = False,
    on_base_set: Callable[[BaseSet], Any] | None = None,
    progress: Callable[[int, int], Any] | None = None,
    batches: Batches | None = None,
) -> tuple[Graph, GraphFile]:
    """Return the graph of a prompt, and its document.

    Args:
        run: folder of a finished run with transcoders, or a run that :func:`open_models` opened.
        prompt: the text, with the markers that the model expects; or token ids.
        question: what to explain.
        config: size of the graph.
        evidence: ablations to measure.
        stream: whose states to explain.
        overlay: transcoders that stand for the base's MLPs, on the model's device and in its dtype.
        dtype: dtype of weights and states; relevance is lost to rounding in 16 bits.
        device, trust_remote_code: settings of the pair.
        on_base_set: called with what the transcoders leave unexplained, before any edge.
        progress: called with numbers of expanded features.
        batches: stores rows and ablations as they are computed, see :mod:`.unfinished`.

    Raises:
        UserError: an impossible question, prompt or run.
    """
    students = run
    if not isinstance(students, ModelSet):
        students = open_models(
            str(run),
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            target_mlps=needs_target_mlps(stream, question),
        )
    model = students.model
    ids = token_ids(model, prompt) if isinstance(prompt, str) else check_ids(model, prompt)
    trace = record(model, ids, stream=stream, rows=config.rows, overlay=overlay)
    base_set = None
    if overlay is not None:
        base_set = _describe_set(trace, overlay)
        if on_base_set is not None:
            on_base_set(base_set)
    target = question.target(trace)
    if evidence.ablations:
        ablation_candidates(trace, Leaves(trace), target)  # an error comes before the work
    graph = grow(trace, [target], config, progress=progress, batches=batches)
    measured = None
    if evidence.ablations:
        measured = measure_evidence(trace, graph.leaves, target, evidence, batches=batches)
    document = describe(
        graph,
        adapter=adapter_digest(students.folder("run")),
        account=account(trace, graph.rows[0]),
        heads=_heads(graph),
        evidence=measured,
        base_set=base_set,
    )
    return graph, document


def _describe_set(trace: Trace, overlay: TranscoderSet) -> BaseSet:
    shares = unexplained_variance(trace.model, overlay, trace.mlp_in)
    return {"name": overlay.name, "model": overlay.model, "unexplained_variance": shares}


def _heads(graph: Graph) -> list[Heads]:
    """Return the strongest edges into the first target by their last attention head."""
    row = graph.rows[0]
    sources = row.sources[:HEADS]
    if len(sources) == 0:
        return []
    split = head_loadings(graph.trace, graph.leaves, row.target, sources)
    loaded: list[Heads] = []
    for i, leaf in enumerate(sources.tolist()):
        places = [(int(a), int(b)) for a, b in torch.nonzero(split.heads[i])]
        heads = [(layer, head, float(split.heads[i, layer, head])) for layer, head in places]
        loaded.append({"node": leaf, "direct": float(split.direct[i]), "heads": heads})
    return loaded
