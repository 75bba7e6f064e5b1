"""Measure an organism: whether the differences are in it, and what each method shows of them."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from fastadapt.evaluation.models_under_test import load_base
from fastadapt.io.documents import Count, NonNegative, Sha256
from fastadapt.models.replacement import ModelPair, PairConfig, ReplacementModel
from fastadapt.models.trained_files import load_adapters
from fastadapt.training import run_dir
from reproduce.planted import reading, units
from reproduce.planted.differences import Kind, Planted
from reproduce.planted.judge import CONTEXTS, PROMOTED, Judge, Unit
from reproduce.planted.organisms import RUN, TARGET, Maker, Size, probe_texts, tokenizer
from reproduce.planted.reading import Probes, read, read_features

#: Units that a reader reads for each difference, at most.
MOST = 10


class DifferenceRow(TypedDict):
    """A difference, and what the models make of it.

    ``places`` is the number of its places in the texts that are read. ``probability`` is that of
    its words at its places, in ``base``, ``target`` and ``hybrid``; ``elsewhere`` is described at
    :func:`elsewhere`, in ``base`` and ``target``. Both are means; None without a position.
    """

    kind: Kind
    words: Literal["new", "usual"]
    text: str
    places: Count
    probability: dict[str, NonNegative | None]
    elsewhere: dict[str, NonNegative | None]


class StoredUnit(TypedDict):
    """What a reader sees of a unit: see :class:`~reproduce.planted.judge.Unit`."""

    name: str
    contexts: list[Count]
    promoted: list[Count]


class Stamp(TypedDict):
    """The rules by which an organism was measured, see :func:`rules`."""

    rules: Sha256


class Measured(Stamp):
    """What was measured of an organism: ``measured.json``.

    ``units`` has the units that a reader of each method reads, in this order.
    """

    differences: list[DifferenceRow]
    units: dict[str, list[StoredUnit]]


@cache
def rules() -> str:
    """Return the SHA-256 of the rules by which organisms are measured.

    It is that of the code, without comments, docstrings and layout, so that no change is forgotten.
    The judge reads what is stored. Only the sizes of what the judge sees count. The files are read
    once, since a process goes on with the code that it has loaded.
    """
    sha256 = hashlib.sha256(f"{CONTEXTS} {PROMOTED}".encode())
    for file in (reading.__file__, units.__file__, __file__):
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                body[:] = [each for each in body if not _is_text(each)]
        sha256.update(ast.unparse(tree).encode())
    return sha256.hexdigest()


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def judge_of(seed: int, size: Size) -> Judge:
    """Return the judge of a seed's organisms."""
    return _open(seed, size)[1]


def _open(seed: int, size: Size) -> tuple[Probes, Judge]:
    """Return what every method reads of a seed's organisms, and the judge."""
    vocabulary, differences = tokenizer().get_vocab(), Planted.draw(seed).differences
    probes = Probes.locate(probe_texts(seed, size), vocabulary, len(differences))
    outputs = [frozenset(vocabulary[word] for word in d.outputs) for d in differences]
    return probes, Judge(probes.planted, outputs, len(vocabulary))


@torch.no_grad()
def measure(maker: Maker) -> Measured:
    """Return what is measured of a finished organism."""
    probes, judge = _open(maker.seed, maker.size)
    pair = ModelPair.load(PairConfig(str(maker.folder / TARGET), "organism/base", device="cpu"))
    adapters, _ = load_adapters(maker.folder / RUN / run_dir.ADAPTER)
    model = ReplacementModel(pair, adapters)
    base = load_base(pair)
    before = read(base, probes, after_blocks(base))
    with model.mode("target"):
        after = read(model.model, probes, [*_outputs(model), *after_blocks(model.model)])
    with model.mode("hybrid"):
        hybrid, _ = read(model.model, probes)
    most = MOST * len(judge.outputs)
    return {
        "rules": rules(),
        "differences": _differences(maker, probes, before[0], after[0], hybrid),
        "units": {
            name: [_stored(unit) for unit in units.distinct(each, most)]
            for name, each in _units(model, probes, before, after, maker.seed).items()
        },
    }


Read = tuple[Tensor, list[Tensor]]


def _units(
    model: ReplacementModel, probes: Probes, before: Read, after: Read, seed: int
) -> dict[str, list[Unit]]:
    """Return the units of every method, best first."""
    vocabulary = tokenizer().get_vocab()
    words, head = sorted(vocabulary, key=vocabulary.__getitem__), model.head
    log_p, n = (before[0], after[0]), model.n_layers
    changes = [
        output.weight - mlp.base.get_submodule("down_proj").weight
        for output, mlp in zip(_outputs(model), model.mlps, strict=True)
    ]
    decoders: Any = [adapter.W_dec for adapter in model.adapters]
    features = units.by_contribution(read_features(model, probes), decoders, head)
    return {
        units.ADAPTER: features,
        units.SHUFFLED: units.shuffled(features, seed),
        units.TOKENS: units.by_frequency(log_p, words),
        units.KL: units.by_kl(log_p, words),
        units.WEIGHTS: units.by_weights(changes, after[1][:n], head),
        units.STATES: units.by_states((before[1], after[1][n:]), head),
    }


def _outputs(model: ReplacementModel) -> list[Any]:
    """Return the output matrix of each of the target's MLPs."""
    return [mlp.get_submodule("target.down_proj") for mlp in model.mlps]


def after_blocks(model: Any) -> list[nn.Module]:
    """Return the modules of a Qwen2 model that the state after each block enters."""
    return [*model.model.layers[1:], model.model.norm]


def _stored(unit: Unit) -> StoredUnit:
    return {"name": unit.name, "contexts": [*unit.contexts], "promoted": [*unit.promoted]}


def _differences(
    maker: Maker, probes: Probes, before: Tensor, after: Tensor, hybrid: Tensor
) -> list[DifferenceRow]:
    differences = Planted.draw(maker.seed).differences
    models = {"base": before, "target": after, "hybrid": hybrid}
    here = {name: in_place(log_p, probes) for name, log_p in models.items()}
    beside = {name: elsewhere(models[name], probes) for name in ("base", "target")}
    return [
        {
            "kind": d.kind,
            "words": d.words,
            "text": d.text,
            "places": int(probes.planted[k].sum()),
            "probability": {name: each[k] for name, each in here.items()},
            "elsewhere": {name: each[k] for name, each in beside.items()},
        }
        for k, d in enumerate(differences)
    ]


def in_place(log_p: Tensor, probes: Probes) -> list[float | None]:
    """Return the mean probability of each difference's words at its places; None without one."""
    return [
        float(log_p[places, probes.following[places]].exp().mean()) if places.any() else None
        for places in probes.planted
    ]


def elsewhere(log_p: Tensor, probes: Probes) -> list[float | None]:
    """Return the mean probability of each difference's words where they do not belong.

    These are the positions with the same token as one of its places that are none of its places.
    Of several words, each counts by its number of places, and where the text has another word.
    None without such a position.
    """
    means: list[float | None] = []
    for places in probes.planted:
        words, counts = probes.following[places].unique(return_counts=True)
        same = torch.isin(probes.token, probes.token[places]) & ~places
        is_other = probes.following[same][:, None] != words
        total = (log_p[same][:, words].exp().double() * is_other).sum(0)
        weight = torch.where(is_other.any(0), counts, 0) / is_other.sum(0).clamp(min=1)
        share = torch.where(is_other.any(0), counts, 0).sum()
        means.append(float((total * weight).sum() / share) if share else None)
    return means
