"""Write the features of a run as upload batches of Neuronpedia (``/api/feature/upload-batch``).

A batch is one JSON file: ``modelId``, ``source`` (``LAYER-SET``) and up to 128 ``features``. A
feature has its ``index``, ``density``, ``explanations`` and ``activations``: the tokens of an
example with the feature's value at each. The server refuses a batch as a whole if one value breaks
a rule, so all rules are applied here. It knows no weights: an upload describes features and runs
nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from fastadapt import __version__
from fastadapt.errors import UserError
from fastadapt.features.store.schema import SAMPLES
from fastadapt.features.store.store import Store

#: Rules of the server.
MAX_FEATURES, MAX_TOKENS, MAX_TEXT, MAX_LOGITS, MAX_INDEX = 128, 1024, 512, 20, 10_000_000
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,254}")
ADDRESS = "https://www.neuronpedia.org/api/feature/upload-batch"


class Explanation(TypedDict):
    """A description of a feature. The server knows no judge of this library, so none is named."""

    text: str


class Activation(TypedDict):
    """An example: tokens, and the activation at each."""

    tokens: list[str]
    values: list[float]


class Logit(TypedDict):
    """A token and its logit in the lens."""

    token: str
    value: float


class Feature(TypedDict):
    """A feature with its examples, at least one."""

    index: int
    density: float
    explanations: list[Explanation]
    activations: list[Activation]
    topLogits: list[Logit]
    bottomLogits: list[Logit]


class Batch(TypedDict):
    """The body of one request."""

    modelId: str
    source: str
    features: list[Feature]


@dataclass
class Written:
    """What an export wrote, and what the rules left out.

    Attributes:
        batches, features: numbers of files and of features in them.
        silent: features without an example.
        shortened: descriptions that were cut to 512 UTF-16 units, as the server counts them.
    """

    batches: int = 0
    features: int = 0
    silent: int = 0
    shortened: int = 0


def write(store: Store, folder: Path, *, model_id: str, source_set: str) -> Written:
    """Write ``layer_{i}/batch_{n}.json`` into an existing folder.

    Args:
        store: the features of a run. folder: the folder. model_id: name of the model in
        Neuronpedia. source_set: name of a set of sources in Neuronpedia that the uploading user has
        created, with the sources ``0-NAME``, ``1-NAME``, ...

    Raises:
        UserError: a name has other characters than Neuronpedia's, or the store is damaged.
        OSError: the folder cannot be written.
    """
    for option, name in (("--model_id", model_id), ("--source_set", source_set)):
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{option}: expected lower-case letters, digits, '.', '_' and '-', got {name!r:.80}"
            )
    written = Written()
    n_layers, n_features = store.shape("adapter")
    if n_features > MAX_INDEX:
        raise UserError(
            f"Neuronpedia takes features up to number {MAX_INDEX:,}, got {n_features:,} per layer"
        )
    strings = store.read("tokens")["string"].to_pylist()
    for layer in range(n_layers):
        features = _features(store, layer, strings, written)
        path = folder / f"layer_{layer}"
        for number, chunk in enumerate(_chunks(features)):
            path.mkdir(exist_ok=True)
            batch: Batch = {
                "modelId": model_id,
                "source": f"{layer}-{source_set}",
                "features": chunk,
            }
            text = json.dumps(batch, ensure_ascii=False, allow_nan=False)
            (path / f"batch_{number:04d}.json").write_text(text + "\n", encoding="utf-8")
            written.batches += 1
            written.features += len(chunk)
    if written.features == 0:
        raise UserError(
            f"{store.folder}: no feature has an example; collect features of more texts"
        )
    return written


def _chunks(features: Iterator[Feature]) -> Iterator[list[Feature]]:
    while chunk := list(islice(features, MAX_FEATURES)):
        yield chunk


def _features(store: Store, layer: int, strings: list[str], written: Written) -> Iterator[Feature]:
    """Yield the features of a layer that have examples, in order."""
    examples = _grouped(store, "examples", layer)
    described = _grouped(store, "descriptions", layer)
    lens = _grouped(store, "lens", layer)
    for row in store.read("features", layer=layer).to_pylist():
        number = row["feature"]
        activations = _activations(examples.get(number, []), strings)
        if not activations:
            written.silent += 1
            continue
        texts = [each["description"].strip() for each in described.get(number, [])]
        written.shortened += sum(_length(text) > MAX_TEXT for text in texts)
        yield {
            "index": number,
            "density": row["density"],
            "explanations": [{"text": _cut(text)} for text in dict.fromkeys(texts) if text],
            "activations": activations,
            "topLogits": _logits(lens.get(number, []), "promoted"),
            "bottomLogits": _logits(lens.get(number, []), "suppressed"),
        }


def _grouped(store: Store, table: str, layer: int) -> dict[int, list[dict[str, Any]]]:
    """Return the rows of a table by feature; none if the table is absent."""
    grouped: dict[int, list[dict[str, Any]]] = {}
    if store.has(table):
        for row in store.read(table, layer=layer).to_pylist():
            grouped.setdefault(row["feature"], []).append(row)
    return grouped


def _activations(rows: list[dict[str, Any]], strings: list[str]) -> list[Activation]:
    """Return the strongest examples first, then those drawn uniformly, each window once."""
    activations: list[Activation] = []
    seen = set[tuple[int, int]]()
    for row in sorted(rows, key=lambda row: (SAMPLES.index(row["sample"]), row["rank"])):
        place = row["text"], row["start"]
        if place in seen or not row["tokens"]:
            continue
        seen.add(place)
        ids = row["tokens"][:MAX_TOKENS]
        tokens = [strings[i] if i < len(strings) else f"<{i}>" for i in ids]
        activations.append({"tokens": tokens, "values": row["values"][:MAX_TOKENS]})
    return activations


def _logits(rows: list[dict[str, Any]], end: str) -> list[Logit]:
    """Return the tokens at one end of a feature's lens, the largest size first."""
    logits: list[Logit] = [
        {"token": token, "value": value}
        for row in rows
        for token, value in zip(row[f"{end}_tokens"], row[f"{end}_logits"], strict=True)
    ]
    return logits[:MAX_LOGITS]


def _length(text: str) -> int:
    """Return the length that the server counts: UTF-16 units, two for a character above U+FFFF."""
    return len(text.encode("utf-16-le")) // 2


def _cut(text: str) -> str:
    if _length(text) <= MAX_TEXT:
        return text
    units = text.encode("utf-16-le")[: 2 * (MAX_TEXT - 1)]
    return units.decode("utf-16-le", "ignore") + "…"  # half a character at the end is left out


def write_record(path: Path, *, model_id: str, source_set: str) -> None:
    """Write the file that says what a folder of batches is."""
    facts = {"schema_version": 1, "format": "neuronpedia", "fastadapt": __version__}
    facts |= {"model_id": model_id, "source_set": source_set}
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
