"""Filter the rows of a source, shuffle them, and draw the two splits by quotas per domain.

Row ``i`` has the key ``blake2b(seed/i)``, and rows are drawn in the order of their keys. The draw
therefore depends on seed and source only, and is uniform over the rows of each domain. The source
is never in memory, since only the rows of each domain with the lowest keys are needed. (arXiv
2602.20904 shuffles with seed 42, but its shuffle depends on the buffer of the reader. Its rows
are not reproduced.)

A prompt occurs in one split only: validation is drawn first, and training skips rows with a prompt
of validation. OpenThoughts3 has up to 16 responses to a prompt, so that splits by row would share
half of their prompts. A split may hold several responses to one prompt, but no conversation twice.
The prompt of a conversation is what the user says before the first response.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple, get_args

from fastadapt.data.contents import Content
from fastadapt.data.rendered import AUTO, END_THINK, THINK
from fastadapt.data.rendering import get_form
from fastadapt.data.sources import Source
from fastadapt.data.tokens import Markers
from fastadapt.errors import UserError, require

Thinking = Literal["required", "any"]
"""Whether rows without reasoning between its markers are left out."""

#: Value of ``--shares`` for a source without domains, and the name of its rows in the counts.
EVERY_ROW, ROWS = "none", "rows"
SPLITS = ("validation", "train")  # in the order of drawing

#: Reasons for leaving out a row. They are keys of the manifest, and so are the reasons for which a
#: row cannot be read. These and the first three are counted over the whole source, the others, and
#: the reasons for which a row cannot be rendered, over the rows that were drawn.
OTHER_DOMAIN, OTHER_REASON = "another domain", "another reason"
NO_THINK, NO_END = f"no {THINK}", f"no {END_THINK} after it"
TOO_LONG = "more than max_tokens tokens"
HELD_OUT, REPEATED = "its prompt is in validation", "the same conversation again"


@dataclass(frozen=True)
class PrepareConfig:
    """Settings of a selection. The defaults are the selection of arXiv 2602.20904.

    Attributes:
        source: file, folder or hub id, as ``data.train``, with a column ``domain`` unless
            ``shares`` is none. The columns ``domain`` (text), ``difficulty`` (integer) and
            ``source`` (text) are copied if present.
        output: folder for train.parquet, validation.parquet and manifest.json.
        tokenizer: folder or hub id of the tokenizer of the pair to be trained.
        family: chat format in which the tokens of a conversation are counted: auto, or the name of
            a family, as ``data.family``.
        columns: column to read, or prompt,response, as ``data.columns``.
        markers: special tokens inside what was said, text or tokens, as ``data.markers``.
        thinking: required: leave out rows in which no response has <think> and a later </think>, or
            the family's own markers; any: take them.
        train: number of conversations to train on.
        validation: number of conversations to hold out.
        max_tokens: leave out longer conversations.
        seed: seed of the order in which rows are drawn.
        shares: share of each domain, as domain=share,...; the shares are relative and need not sum
            to 1. none: draw from all rows, with or without a domain.
        split: split of a hub dataset or folder.
        subset: configuration of a hub dataset, or folder in a folder.
        revision: branch, tag or commit of a hub dataset.
        reserve: candidates to store per wanted conversation; raise it if training skips many rows
            because their prompt is in validation.
        allow_fewer: take fewer conversations instead of an error if a domain cannot fill its quota.
    """

    source: str = "open-thoughts/OpenThoughts3-1.2M"
    output: str = "data/openthoughts3"
    tokenizer: str = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    family: str = "r1-distill"
    columns: str | None = None
    markers: Markers = "text"
    thinking: Thinking = "required"
    train: int = 50_000
    validation: int = 5_000
    max_tokens: int = 10_000
    seed: int = 42
    shares: str = "math=.708,code=.208,science=.083"
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    reserve: float = 1.25
    allow_fewer: bool = False

    def __post_init__(self) -> None:
        if self.family != AUTO:
            get_form(self.family)
        for name, choices in (("markers", Markers), ("thinking", Thinking)):
            known, value = get_args(choices), getattr(self, name)
            require(value in known, f"--{name}", f"one of {', '.join(known)}", value)
        for name, least in (("train", 1), ("validation", 0), ("max_tokens", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name}: expected {least} or more, got {getattr(self, name)}")
        if not self.reserve >= 1:
            raise UserError(f"--reserve: expected 1 or more, got {self.reserve}")
        parse_shares(self.shares)

    @property
    def where(self) -> Source:
        """The source, and how it is read."""
        return Source(self.source, self.split, self.revision, self.subset, self.columns)

    @property
    def has_domains(self) -> bool:
        """Whether rows are drawn by domain."""
        return self.shares.strip() != EVERY_ROW

    def quotas(self) -> dict[str, dict[str, int]]:
        """Return the number of conversations of each split (``SPLITS``) and domain."""
        shares = parse_shares(self.shares)
        return {split: apportion(getattr(self, split), shares) for split in SPLITS}


def parse_shares(text: str) -> dict[str, Fraction]:
    """Parse shares of domains as exact numbers; ``EVERY_ROW`` is one domain with all rows.

    Raises:
        UserError: the text is not domain=share,..., repeats a domain, or has a share of 0 or less.

    Example:
        >>> parse_shares("math=.7,code=.3")
        {'math': Fraction(7, 10), 'code': Fraction(3, 10)}
    """
    if text.strip() == EVERY_ROW:
        return {ROWS: Fraction(1)}
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
                f"as in math=.7,code=.3, or {EVERY_ROW} to draw from all rows; got {text!r}"
            )
        shares[domain.strip()] = share
    return shares


def apportion(n: int, shares: Mapping[str, Fraction]) -> dict[str, int]:
    """Divide ``n`` by shares (largest remainder method) into counts that sum to ``n``.

    Each count is within 1 of its exact share. The shares need not sum to 1 (those of arXiv
    2602.20904 sum to .999). The published splits hold 49,952 and 4,996 conversations instead of
    50,000 and 5,000, since each part of 55,000 was rounded separately.

    Example:
        >>> apportion(10, parse_shares("math=2,code=1"))
        {'math': 7, 'code': 3}
    """
    total = sum(shares.values())
    exact = {domain: n * share / total for domain, share in shares.items()}
    counts = {domain: int(part) for domain, part in exact.items()}
    by_remainder = sorted(exact, key=lambda domain: counts[domain] - exact[domain])
    for domain in by_remainder[: n - sum(counts.values())]:
        counts[domain] += 1
    return counts


def row_key(seed: int, row: int) -> int:
    """Return the 64-bit key by which a row of the source, counted from 0, is sorted."""
    return int.from_bytes(_hash(f"{seed}/{row}".encode(), 8), "big")


def prompt_hash(prompt: str) -> str:
    """Hash a prompt; prompts that differ only in white space have equal hashes."""
    return _hash(" ".join(prompt.split()).encode(), 16).hex()


def content_hashes(content: Content) -> tuple[str, str]:
    """Return the hash of a row's prompt and of its whole content.

    White space of the user's turns is normalized, that of other turns and of texts is not. Plain
    text and token ids are a prompt as a whole.

    Example:
        >>> from fastadapt.data.contents import Turn
        >>> prompt = Turn("user", "1 +  1")
        >>> one, two = (Content((prompt, Turn("assistant", answer))) for answer in "23")
        >>> content_hashes(one)[0] == content_hashes(two)[0] == prompt_hash("1 + 1")
        True
        >>> content_hashes(one)[1] == content_hashes(two)[1]
        False
    """
    if content.ids is not None:
        whole = _hash(repr(content.ids).encode(), 16).hex()
        return whole, whole
    if content.text is not None:
        return prompt_hash(content.text), _hash(content.text.encode(), 16).hex()
    turns = content.turns
    first = next(i for i, turn in enumerate(turns) if turn.role == "assistant")
    prompts = [turn.text for turn in turns[:first] if turn.role != "system"]
    said = [
        (role, prompt_hash(text) if role == "user" else _hash(text.encode(), 16).hex())
        for role, text in turns
    ]
    whole = _hash(repr(said).encode(), 16).hex()
    return prompt_hash("\n".join(prompts)) if prompts else whole, whole


def _hash(data: bytes, size: int) -> bytes:
    return hashlib.blake2b(data, digest_size=size).digest()


def lacks_thinking(content: Content, thinking: tuple[str, str] = (THINK, END_THINK)) -> str | None:
    """Return which marker of reasoning a row's responses or text lack; None if both occur.

    One response with both suffices.
    """
    texts = [turn.text for turn in content.turns if turn.role == "assistant"]
    texts += [] if content.text is None else [content.text]
    start, end = thinking
    opened = [text.partition(start)[2] for text in texts if start in text]
    if not opened:
        return NO_THINK
    return None if any(end in text for text in opened) else NO_END


class Candidate(NamedTuple):
    """A row of the source that can be drawn.

    Attributes:
        key: :func:`row_key` of the row.
        row: row of the source, counted from 0.
        domain: domain of the row.
        prompt: hash of the row's prompt (:func:`content_hashes`).
        conversation: hash of the row's whole content.
        tokens: tokens of the rendered conversation.
        unpacked: bytes of its columns as JSON.
        marked: whether what was said holds a marker or another special token.
    """

    key: int
    row: int
    domain: str
    prompt: str
    conversation: str
    tokens: int
    unpacked: int
    marked: bool = False


class Shortlist:
    """The candidates with the lowest random keys in each domain, and the keys of refused rows.

    Args:
        limits: largest number of candidates of each domain.

    Attributes:
        full: domains that had more candidates than their limit.
    """

    def __init__(self, limits: Mapping[str, int]) -> None:
        self._limits = dict(limits)
        # Max-heaps: heapq pops the smallest item, so keys are negated.
        self._heaps: dict[str, list[tuple[int, int, Candidate]]] = {d: [] for d in limits}
        self._refused: dict[str, list[tuple[int, str]]] = {domain: [] for domain in limits}
        self.full: set[str] = set()

    def admits(self, domain: str, key: int) -> bool:
        """Return whether a row with this key can still be among the lowest of its domain."""
        heap = self._heaps[domain]
        if len(heap) < self._limits[domain]:
            return True
        self.full.add(domain)
        return key < -heap[0][0]

    def add(self, candidate: Candidate) -> None:
        """Add a candidate; drop the candidate with the highest key if the domain is full."""
        heap = self._heaps[candidate.domain]
        item = (-candidate.key, -candidate.row, candidate)
        if len(heap) < self._limits[candidate.domain]:
            heapq.heappush(heap, item)
        else:
            self.full.add(candidate.domain)
            heapq.heappushpop(heap, item)

    def refuse(self, domain: str, key: int, reason: str) -> None:
        """Add the key of a row that is too long, or cannot be rendered."""
        self._refused[domain].append((key, reason))

    def ordered(self, domain: str) -> list[Candidate]:
        """Return the candidates of a domain in the order of drawing."""
        return sorted((c for _, _, c in self._heaps[domain]), key=lambda c: (c.key, c.row))

    def refused(self, domain: str, last: int) -> Counter[str]:
        """Count, by reason, the refused rows of a domain that have a key of at most ``last``."""
        return Counter(reason for key, reason in self._refused[domain] if key <= last)


@dataclass(frozen=True)
class Selection:
    """Result of drawing the splits.

    Attributes:
        splits: candidates of each split, in the order of their keys over all domains.
        left_out: number of drawn rows that were left out, by domain and reason.
        missing: number of missing conversations by split and domain, without zeros.
    """

    splits: dict[str, list[Candidate]]
    left_out: dict[str, Counter[str]]
    missing: dict[str, dict[str, int]]


def draw(shortlist: Shortlist, quotas: Mapping[str, Mapping[str, int]]) -> Selection:
    """Draw candidates in the order of their keys, for validation first, then for training."""
    domains = list(quotas["train"])
    candidates = {domain: iter(shortlist.ordered(domain)) for domain in domains}
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
            while wanted and (candidate := next(candidates[domain], None)) is not None:
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
        # If a domain cannot fill its quota, all of its rows were drawn.
        ran_out = any(domain in lacking for lacking in missing.values())
        left_out[domain][TOO_LONG] = 0
        left_out[domain].update(shortlist.refused(domain, 2**64 if ran_out else last[domain]))
    return Selection(splits, left_out, missing)


def length_histogram(tokens: Sequence[int], max_tokens: int, bins: int = 10) -> list[int]:
    """Count the lengths in each of ``bins`` equal parts of ``1..max_tokens``.

    Example:
        >>> length_histogram([1, 5, 10, 10], max_tokens=10, bins=2)
        [2, 2]
    """
    counts = [0] * bins
    for n in tokens:
        counts[min((n - 1) * bins // max_tokens, bins - 1)] += 1
    return counts
