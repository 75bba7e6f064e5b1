"""How far each student's predictions are from the target's, at every position of given texts.

KL(target ‖ student) in nats and whether the most likely token is the target's, kept per position;
NMSE of the residual stream per layer, kept per text; L0 where there are features. All students of a
batch go through the layers beside one pass of the target, and share its softmax. The base is
another model, with its own blocks, embeddings and head: of it there is KL and top-1 alone.

B texts, T tokens, P positions that predict (one less than tokens), S students, L layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from fastadapt.batch import Batch
from fastadapt.errors import RunError, UserError
from fastadapt.evaluation.faithfulness.partial_results import Arrays, Parts, unfinished
from fastadapt.evaluation.faithfulness.texts import Text, batch_of, batches_of, digest_of
from fastadapt.evaluation.models_under_test import Students
from fastadapt.kernels.linear_kl import LinearKLOutput, linear_kl
from fastadapt.kernels.nmse import nmse
from fastadapt.models.replacement import ReplacementModel
from fastadapt.models.traversal import final_norm, side_by_side

_SCHEMA = 1  # of the arrays: another one makes old files unknown
_NMSE = ("nmse", "token_nmse")


@dataclass(frozen=True)
class OutputConfig:
    """How the measuring is done; values depend on it by rounding only.

    Args:
        batch_tokens: tokens of a batch, padding included; a longer text is a batch of its own.
        chunk_tokens: tokens whose logits exist at a time.
        students_at_once: that share one pass of the target, whose adapters are in memory together.
    """

    batch_tokens: int = 8192
    chunk_tokens: int = 1024
    students_at_once: int = 8

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "chunk_tokens", "students_at_once"):
            if getattr(self, name) < 1:
                raise UserError(f"outputs.{name}: expected at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Measured:
    """Arrays of one student over n texts, on the CPU.

    Attributes:
        kl: float32 ``[P]``: KL(target ‖ student) in nats, at the positions of text 0, then 1, ...
        agrees: bool ``[P]``: whether the most likely tokens are the same.
        text: int64 ``[P]``: which text a position is of.
        position: int64 ``[P]``: its place in it, from 0; it predicts the token after.
        nmse, token_nmse: float32 ``[n, 2, L+1]``, or None for another model's states: after the
            embeddings and every block, of all tokens, and of all but the first. The former is one
            ratio per text, the latter the mean of one ratio per token.
        l0: active features per token and layer, over all texts; None without features.
    """

    kl: Tensor
    agrees: Tensor
    text: Tensor
    position: Tensor
    nmse: Tensor | None = None
    token_nmse: Tensor | None = None
    l0: float | None = None


def measure_output(
    students: Students,
    texts: Sequence[Text],
    folder: Path,
    *,
    names: Sequence[str] | None = None,
    config: OutputConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
    stop: Event | None = None,
) -> dict[str, Measured]:
    """Measure students on texts, or read what was measured before.

    Args:
        students: the runs.
        texts: of the target's own sampling.
        folder: where arrays are kept: a file per student, once it is finished; until then one per
            batch. What is there already is not measured again.
        names: of the students; all that ``students`` has if not given, the base among them.
        progress: told (batches done, batches in all), summed over students.
        stop: ends the call after the batch at hand.

    Returns:
        By name, the students that are finished: all of them, unless stopped.

    Raises:
        UserError: texts that cannot be measured, or a name that is no student's.
        RunError: a prediction is not finite, or the folder cannot be written.
    """
    config = config or OutputConfig()
    batches = batches_of(texts, config.batch_tokens)
    facts = ("output", _SCHEMA, digest_of(texts), config.batch_tokens, config.chunk_tokens)
    arrays = partial(_arrays, students, texts, len(batches))
    stores = stores_of(students, names, folder, facts, len(batches), arrays)
    with ExitStack() as held:
        base = None
        for i, todo in unfinished(stores, config.students_at_once, progress, stop):
            if "base" in todo and base is None:
                base = held.enter_context(students.base())
            batch = batch_of(texts, batches[i]).to(students.model.device)
            for name, tensors in _measure(students, batch, todo, base, config.chunk_tokens).items():
                check_finite(name, tensors["kl"], [texts[j].id for j in batches[i]])
                stores[name].add(i, tensors)
    order = torch.tensor([i for batch in batches for i in batch])
    return {
        name: _in_order(_read(store, texts), order, texts)
        for name, store in stores.items()
        if not store.missing()
    }


def stores_of(
    students: Students,
    names: Sequence[str] | None,
    folder: Path,
    facts: tuple[object, ...],
    n_parts: int,
    arrays: Callable[[str], Arrays],
) -> dict[str, Parts]:
    """Where the arrays of each student are kept; ``facts`` and the models decide the file.

    ``arrays`` gives those of a student, by its name.

    Raises:
        UserError: a name is no student's.
    """
    names = list(students.students) if names is None else list(names)
    if unknown := [name for name in names if name not in students.students]:
        raise UserError(
            f"no student is called {unknown[0]!r}; there are {', '.join(students.students)}"
        )
    stores = {}
    for name in names:
        told = hashlib.sha256(repr((facts, students.fingerprint(name))).encode()).hexdigest()
        stores[name] = Parts(folder, name, told, n_parts, arrays(name))
    return stores


def check_finite(name: str, values: Tensor, texts: Sequence[str]) -> None:
    """Refuse predictions that are not finite.

    Raises:
        RunError: they are not.
    """
    if not values.isfinite().all():
        raise RunError(f"{name}: a prediction on texts {', '.join(texts)} is not finite")


def _arrays(students: Students, texts: Sequence[Text], n_batches: int, name: str) -> Arrays:
    """What is kept of a student: the arrays of ``_measure``, of all batches."""
    positions, n_layers = sum(len(text.ids) - 1 for text in texts), students.model.n_layers
    arrays: dict[str, tuple[torch.dtype, tuple[int | None, ...]]] = {
        "kl": (torch.float32, (positions,)),
        "agrees": (torch.bool, (positions,)),
    }
    if name != "base":
        for key in _NMSE:
            arrays[key] = torch.float32, (len(texts), 2, n_layers + 1)
    if students.students[name].kind == "transcoder":
        arrays["active"] = torch.int64, (n_batches, n_layers)
        arrays["tokens"] = torch.int64, (n_batches,)
    return arrays


@torch.no_grad()
def _measure(
    students: Students, batch: Batch, names: Sequence[str], base: Any, chunk_tokens: int
) -> dict[str, dict[str, Tensor]]:
    """Arrays of some students on one batch: of texts in its order, as :class:`Parts` joins them."""
    model = students.model
    inside = [name for name in names if name != "base"]
    streams = [students.stream(name) for name in inside]
    layers: dict[str, list[list[Tensor]]] = {name: [[], []] for name in inside}
    active: dict[str, list[Tensor]] = {name: [] for name in inside}
    h, states = None, []
    for passed in side_by_side(model, batch, streams):
        h, states = passed.target, passed.students
        for name, state, aux in zip(inside, states, passed.aux, strict=True):
            for kept, values in zip(layers[name], _errors(state, h, batch.real), strict=True):
                kept.append(values)
            if aux is not None:
                active[name].append(aux.stats.n_active)
    assert h is not None
    teacher = model.final_norm(h, "target")
    predicts = batch.real[:, 1:] & batch.real[:, :-1]
    out: dict[str, dict[str, Tensor]] = {}
    if inside:
        finals = [final_norm(model, x, to) for x, to in zip(states, streams, strict=True)]
        got = _kl(model, teacher, finals, model.head, predicts, chunk_tokens)
        for s, name in enumerate(inside):
            out[name] = {"kl": got.token_kl[s], "agrees": got.token_top1[s]}
            for key, kept in zip(_NMSE, layers[name], strict=True):
                # The embeddings are the same.
                out[name][key] = torch.stack([torch.zeros_like(kept[0]), *kept], -1)
            if active[name]:
                out[name]["active"] = torch.stack(active[name])[None]
                out[name]["tokens"] = batch.real.sum()[None]
    if "base" in names:
        final = _last_hidden(base, model, batch)
        # One op, whose teacher and student have a head each: side by side, with zeros between.
        head = base.get_output_embeddings().weight
        heads = torch.cat([model.head, head.to(model.head.dtype)], 1)
        beside = torch.zeros_like(teacher)
        teacher = torch.cat([teacher, beside], -1)
        final = torch.cat([beside, final], -1)
        got = _kl(model, teacher, [final], heads, predicts, chunk_tokens)
        out["base"] = {"kl": got.token_kl[0], "agrees": got.token_top1[0]}
    return {
        name: {key: _stored(values) for key, values in tensors.items()}
        for name, tensors in out.items()
    }


def _stored(values: Tensor) -> Tensor:
    return values.float().cpu() if values.is_floating_point() else values.cpu()


def _errors(state: Tensor, target: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """NMSE after one block, ``[B, 2]`` each: one ratio per text, and the mean of one per token."""
    rest = real.clone()
    rest[:, 0] = False
    of_text, of_token = [], []
    for mask in (real, rest):
        got = nmse(state, target, mask=mask)
        of_text.append(got.nmse)
        of_token.append(torch.where(mask, got.token_nmse, 0).sum(1) / mask.sum(1).clamp(min=1))
    return torch.stack(of_text, -1), torch.stack(of_token, -1)


def _kl(
    model: ReplacementModel,
    teacher: Tensor,
    finals: Sequence[Tensor],
    head: Tensor,
    predicts: Tensor,
    chunk_tokens: int,
) -> LinearKLOutput:
    """The op at the positions that predict a token, text after text."""
    return linear_kl(
        teacher[:, :-1][predicts],
        [final[:, :-1][predicts] for final in finals],
        head,
        softcap=model.softcap,
        chunk_tokens=chunk_tokens,
    )


def _last_hidden(base: Any, model: ReplacementModel, batch: Batch) -> Tensor:
    decoder = getattr(base, model.paths.decoder)
    mask = batch.attention_mask
    got = decoder(input_ids=batch.input_ids, attention_mask=mask, use_cache=False)
    hidden: Tensor = got.last_hidden_state
    return hidden


def _read(store: Parts, texts: Sequence[Text]) -> dict[str, Tensor]:
    tensors = store.read()
    if "tokens" in tensors:
        expected, got = sum(len(text.ids) for text in texts), int(tensors["tokens"].sum())
        if got != expected:
            raise store.damaged(f"tensor tokens: expected {expected:,} in all, got {got:,}")
        if bool((tensors["active"] < 0).any()):
            raise store.damaged("tensor active: expected counts, got a negative number")
    return tensors


def _in_order(tensors: dict[str, Tensor], order: Tensor, texts: Sequence[Text]) -> Measured:
    """Arrays of texts as they were batched, in the order in which they were given."""
    lengths = torch.tensor([len(text.ids) - 1 for text in texts])
    batched = lengths[order]
    text = order.repeat_interleave(batched)
    position = torch.cat([torch.arange(n) for n in batched.tolist()])
    sort = text.argsort(stable=True)
    given = order.argsort()
    l0 = None
    if "active" in tensors:
        active, tokens = tensors["active"], tensors["tokens"]
        l0 = (active.sum().double() / (tokens.sum() * active.shape[1])).item()
    return Measured(
        kl=tensors["kl"][sort],
        agrees=tensors["agrees"][sort],
        text=text[sort],
        position=position[sort],
        **{key: tensors[key][given] for key in _NMSE if key in tensors},
        l0=l0,
    )
