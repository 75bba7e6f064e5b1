"""Which conversations of a source are taken: filters, quotas, a shuffled order, two splits.

The order is a shuffle of the whole source: row ``i`` gets the key ``blake2b(seed/i)``, and rows are
drawn in the order of their keys. What is drawn thus depends on seed and source alone, is uniform
over each domain wherever in the source it lies, and needs no row in memory: of each domain only the
rows with the lowest keys matter (arXiv 2602.20904 says "shuffled with seed 42"; which rows that
gives there depends on the reader's buffer, so its very rows are not reproduced).

A prompt is in one split only: validation draws first, and training passes over rows whose prompt
validation has. OpenThoughts3 has up to 16 responses to a prompt, so splits by row would share half
of their prompts. Within a split a prompt may come again with another response, as in the source;
the same conversation is taken once.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from fastadapt.data.rendering import END_THINK, THINK, get_family, turns
from fastadapt.errors import UserError

SPLITS = ("validation", "train")  # in the order in which they draw

#: Why a row is left out, in the order of the tests. The first four are counted over the whole
#: source, the others among the rows that were drawn.
OTHER_DOMAIN, MALFORMED = "another domain", "not a prompt and a response"
NO_THINK, NO_END = f"no {THINK}", f"no {END_THINK} after it"
TOO_LONG = "more than max_tokens tokens"
HELD_OUT, REPEATED = "its prompt is in validation", "the same conversation again"


@dataclass(frozen=True)
class PrepareConfig:
    """What to select from which source; the defaults are the selection of arXiv 2602.20904.

    Attributes:
        source: hub id of a dataset, or a .jsonl or .parquet file, or a folder of such files, with
            columns ``conversations`` and ``domain``. ``difficulty`` (an integer) and ``source``
            (text) are kept where there are any.
        output: folder for train.parquet, validation.parquet and manifest.json.
        tokenizer: folder or hub id; of the pair that will be trained.
        family: how a conversation is rendered before its tokens are counted.
        train: conversations to train on.
        validation: conversations to hold out.
        max_tokens: longer conversations are left out.
        seed: of the order in which rows are drawn.
        shares: of each domain, as domain=share,...; relative, each split is filled to its size.
        split: of a hub dataset or folder.
        revision: branch, tag or commit of a hub dataset.
        reserve: conversations kept at hand while reading, per one that is wanted; more are needed
            where so many rows repeat a prompt that training has to pass over a large part.
        allow_fewer: take what there is where a domain cannot fill its quota, instead of an error.
    """

    source: str = "open-thoughts/OpenThoughts3-1.2M"
    output: str = "data/openthoughts3"
    tokenizer: str = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    family: str = "r1-distill"
    train: int = 50_000
    validation: int = 5_000
    max_tokens: int = 10_000
    seed: int = 42
    shares: str = "math=.708,code=.208,science=.083"
    split: str = "train"
    revision: str | None = None
    reserve: float = 1.25
    allow_fewer: bool = False

    def __post_init__(self) -> None:
        get_family(self.family)
        for name, least in (("train", 1), ("validation", 0), ("max_tokens", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name}: expected {least} or more, got {getattr(self, name)}")
        if not self.reserve >= 1:
            raise UserError(f"--reserve: expected 1 or more, got {self.reserve}")
        parse_shares(self.shares)

    def quotas(self) -> dict[str, dict[str, int]]:
        """Conversations of each split (``SPLITS``) and domain."""
        shares = parse_shares(self.shares)
        return {split: apportion(getattr(self, split), shares) for split in SPLITS}


def parse_shares(text: str) -> dict[str, Fraction]:
    """``math=.7,code=.3`` as exact numbers."""
    shares: dict[str, Fraction] = {}
    for part in text.split(","):
        domain, equals, number = part.partition("=")
        try:
            share = Fraction(number.strip())
        except (ValueError, ZeroDivisionError):
            share = Fraction(0)
        if not equals or share <= 0 or not domain.strip() or domain.strip() in shares:
            raise UserError(
                "--shares: expected domain=share,... with each domain once and shares above 0, "
                f"as in math=.7,code=.3; got {text!r}"
            )
        shares[domain.strip()] = share
    return shares


def apportion(n: int, shares: Mapping[str, Fraction]) -> dict[str, int]:
    """``n`` in these proportions: each rounded down, what is left goes to the largest remainders.

    The shares need not sum to 1 (those of the paper sum to .999); the counts sum to ``n``, each
    within 1 of its exact part. (The published splits hold 49,952 and 4,996: parts of 55,000, each
    rounded by itself.)
    """
    total = sum(shares.values())
    exact = {domain: n * share / total for domain, share in shares.items()}
    counts = {domain: int(part) for domain, part in exact.items()}
    by_remainder = sorted(exact, key=lambda domain: counts[domain] - exact[domain])
    for domain in by_remainder[: n - sum(counts.values())]:
        counts[domain] += 1
    return counts


def row_key(seed: int, row: int) -> int:
    """Where row ``row`` of the source, counted from 0, stands in the shuffled order; 64 bits."""
    return int.from_bytes(_hash(f"{seed}/{row}".encode(), 8), "big")


def prompt_hash(prompt: str) -> str:
    """Equal for prompts that differ in white space alone."""
    return _hash(" ".join(prompt.split()).encode(), 16).hex()


def conversation_hash(prompt: str, response: str) -> str:
    """Equal for equal conversations."""
    return _hash(prompt_hash(prompt).encode() + response.encode(), 16).hex()


def _hash(data: bytes, size: int) -> bytes:
    return hashlib.blake2b(data, digest_size=size).digest()


def look_at(values: Mapping[str, Any], domains: Iterable[str]) -> tuple[str, str] | str:
    """Prompt and response of a row, or why it is left out; its tokens are not counted here."""
    if not isinstance(values["domain"], str) or values["domain"] not in domains:
        return OTHER_DOMAIN
    try:
        prompt, response = turns(values["conversations"])
    except UserError:
        return MALFORMED
    opened = response.find(THINK)
    if opened < 0:
        return NO_THINK
    if response.find(END_THINK, opened + len(THINK)) < 0:
        return NO_END
    return prompt, response


class Candidate(NamedTuple):
    """A row that may be taken; ``unpacked`` is the size of its text in bytes."""

    key: int
    row: int
    domain: str
    prompt: str
    conversation: str
    tokens: int
    unpacked: int


class Shortlist:
    """Of each domain the candidates with the lowest keys, and the keys of rows that are too long.

    Args:
        limits: candidates kept of each domain.
    """

    def __init__(self, limits: Mapping[str, int]) -> None:
        self._limits = dict(limits)
        self._heaps: dict[str, list[tuple[int, int, Candidate]]] = {d: [] for d in limits}
        self._too_long: dict[str, list[int]] = {domain: [] for domain in limits}
        self.full: set[str] = set()  # domains of which candidates were let go

    def knows(self, domain: str) -> bool:
        """Whether rows of the domain can be drawn."""
        return domain in self._limits

    def admits(self, domain: str, key: int) -> bool:
        """Whether a row of this key can still be among the lowest."""
        heap = self._heaps[domain]
        if len(heap) < self._limits[domain]:
            return True
        self.full.add(domain)
        return key < -heap[0][0]

    def add(self, candidate: Candidate) -> None:
        """Take a candidate in; the highest key goes where there are too many."""
        heap = self._heaps[candidate.domain]
        item = (-candidate.key, -candidate.row, candidate)
        if len(heap) < self._limits[candidate.domain]:
            heapq.heappush(heap, item)
        else:
            self.full.add(candidate.domain)
            heapq.heappushpop(heap, item)

    def add_too_long(self, domain: str, key: int) -> None:
        """Note a row that would have been drawn but for its length."""
        self._too_long[domain].append(key)

    def ordered(self, domain: str) -> list[Candidate]:
        """The candidates of a domain in the order in which they are drawn."""
        return sorted((c for _, _, c in self._heaps[domain]), key=lambda c: (c.key, c.row))

    def too_long(self, domain: str, last: int) -> int:
        """How many too long rows were drawn, up to key ``last``."""
        return sum(key <= last for key in self._too_long[domain])


@dataclass(frozen=True)
class Selection:
    """What was drawn.

    Attributes:
        splits: the candidates of each split, in the order of their keys over all domains.
        left_out: rows drawn and left out, by domain and reason.
        missing: conversations lacking, by split and domain; empty where every quota is met.
    """

    splits: dict[str, list[Candidate]]
    left_out: dict[str, Counter[str]]
    missing: dict[str, dict[str, int]]


def draw(shortlist: Shortlist, quotas: Mapping[str, Mapping[str, int]]) -> Selection:
    """Fill the quotas of each domain in the order of the keys: validation, then training."""
    domains = list(quotas["train"])
    rest = {domain: iter(shortlist.ordered(domain)) for domain in domains}
    left_out: dict[str, Counter[str]] = {domain: Counter() for domain in domains}
    last = dict.fromkeys(domains, -1)
    seen: set[str] = set()
    held_out: set[str] = set()
    splits: dict[str, list[Candidate]] = {}
    missing: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        taken: list[Candidate] = []
        for domain in domains:
            wanted = quotas[split][domain]
            while wanted and (candidate := next(rest[domain], None)) is not None:
                last[domain] = candidate.key
                if candidate.conversation in seen:
                    left_out[domain][REPEATED] += 1
                elif candidate.prompt in held_out:
                    left_out[domain][HELD_OUT] += 1
                else:
                    seen.add(candidate.conversation)
                    taken.append(candidate)
                    wanted -= 1
            if wanted:
                missing.setdefault(split, {})[domain] = wanted
        if split == "validation":
            held_out = {candidate.prompt for candidate in taken}
        splits[split] = sorted(taken, key=lambda c: (c.key, c.row))
    for domain in domains:
        # Where the source ran out, all of it was drawn.
        ran_out = any(domain in lacking for lacking in missing.values())
        left_out[domain][TOO_LONG] = shortlist.too_long(domain, 2**64 if ran_out else last[domain])
    return Selection(splits, left_out, missing)


def length_histogram(tokens: Sequence[int], max_tokens: int, bins: int = 10) -> list[int]:
    """How many lengths lie in each of ``bins`` equal parts of ``1..max_tokens``."""
    counts = [0] * bins
    for n in tokens:
        counts[min((n - 1) * bins // max_tokens, bins - 1)] += 1
    return counts
