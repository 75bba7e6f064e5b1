"""Write a small file in the schema of OpenThoughts3.

Like the published file, it is sorted by domain (850 : 250 : 100) and has several responses to each
prompt.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WORDS = ("what", "is", "1", "2", "3", "4", "+", "=", "?", ".", "wait", "so")
DOMAINS = {"math": 850, "code": 250, "science": 100}

#: Files of a finished selection.
FILES = ("train.parquet", "validation.parquet", "manifest.json")


def rows(n: int, *, copies: int = 4, words: int = 30, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield ``n`` rows. A tenth lacks <think>, a tenth lacks </think>, a tenth is long."""
    draw = random.Random(seed)
    total = sum(DOMAINS.values())
    n_rows = 0
    for i, (domain, share) in enumerate(DOMAINS.items()):
        count = n - n_rows if i == len(DOMAINS) - 1 else n * share // total
        prompt = ""
        for j in range(count):
            if j % copies == 0:
                prompt = f"{domain} {j} " + " ".join(draw.choices(WORDS, k=5))
            yield {
                "difficulty": None if domain != "code" else draw.randint(1, 10),
                "source": f"made/{domain}",
                "domain": domain,
                "conversations": [
                    {"from": "human", "value": prompt},
                    {"from": "gpt", "value": _response(draw, draw.randrange(10), words)},
                ],
            }
        n_rows += count


def _response(draw: random.Random, kind: int, words: int) -> str:
    n = draw.randint(words // 2, words)
    thought = " ".join(draw.choices(WORDS, k=4 * n if kind == 2 else n))
    if kind == 0:
        return f"{thought} </think> <answer>"
    if kind == 1:
        return f"</think> <think> {thought}"
    return f"<think> {thought} </think> so {draw.randint(0, 9**9)}"


def write_jsonl(path: Path, n: int, **how: Any) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for row in rows(n, **how):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def write_parquet(path: Path, n: int, *, group: int = 700, **how: Any) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    turn = pa.struct([("from", pa.string()), ("value", pa.string())])
    schema = pa.schema(
        [
            ("difficulty", pa.int64()),
            ("source", pa.string()),
            ("domain", pa.string()),
            ("conversations", pa.list_(turn)),
        ]
    )
    with pq.ParquetWriter(path, schema) as writer:
        waiting: list[dict[str, Any]] = []
        for row in rows(n, **how):
            waiting.append(row)
            if len(waiting) == group:
                writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
                waiting = []
        writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
    return path


def rows_of(folder: str | Path, split: str) -> list[dict[str, Any]]:
    """Return the rows of a selected split."""
    import pyarrow.parquet as pq

    return pq.read_table(Path(folder) / f"{split}.parquet").to_pylist()


def bytes_of(folder: str | Path) -> dict[str, bytes]:
    """Return the bytes of every file of a selection."""
    return {name: (Path(folder) / name).read_bytes() for name in FILES}


def said(row: dict[str, Any]) -> list[str]:
    """Return what the turns of a row of a selection say."""
    return [turn["content"] for turn in row["messages"]]
