"""Settings of collecting, and the part of the texts that one of several processes reads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from fastadapt.errors import UserError
from fastadapt.features.store.schema import KINDS, Kind

DOMAINS = 64  #: at most; the counts of 28 layers of 8,192 units then take 2 GB


@dataclass(frozen=True)
class CollectConfig:
    """Settings of collecting: texts to read, and examples to store of each feature or neuron.

    Args:
        data: conversations, named as ``data.train`` is; the run's held-out data if not given. A
            column ``domain`` may have 64 different values at most: each unit is counted in each.
        split: split of ``data`` on the hub or in a folder; ``validation`` if not given.
        n: number of conversations to read, from the first; all if not given.
        max_tokens: longer conversations are left out, and so are those longer than the model's
            context.
        top: strongest activations stored of each unit.
        uniform: activations drawn uniformly from all of a unit's.
        before: tokens of a window before the token of the activation.
        after: tokens of a window after the token of the activation.
        kinds: ``adapter``, its features; ``base`` and ``target``, MLP neurons of the base (run in
            the replacement model) and of the target (run in the target), as baselines.
        neurons_per_token: neurons of a layer that count as active on a token: the largest products
            of activation and norm of the neuron's output, if positive. Without this bound about
            half of the neurons fire on any token. If not given, the run's measured L0, rounded up.
        seed: seed of the uniform draw.
        batch_tokens: tokens of a batch, padding included; a longer text is a batch of its own.
        snapshot_tokens: tokens between two snapshots, from which an interrupted run resumes.
        demeaned: subtract the mean over the vocabulary from the logit lens.
        scales: measure how far the MLPs of base and target already write what each feature writes.
            The target's MLPs are run too, on the inputs of the adapters. Adapters without the
            base's MLP beside them have no scales.
    """

    data: str | None = None
    split: str | None = None
    n: int | None = None
    max_tokens: int = 10_000
    top: int = 20
    uniform: int = 10
    before: int = 50
    after: int = 20
    kinds: tuple[Kind, ...] = ("adapter",)
    neurons_per_token: int | None = None
    seed: int = 0
    batch_tokens: int = 8192
    snapshot_tokens: int = 1_000_000
    demeaned: bool = True
    scales: bool = True

    def __post_init__(self) -> None:
        least = {"top": 1, "uniform": 0, "before": 0, "after": 0, "max_tokens": 2, "seed": 0}
        least |= {"batch_tokens": 1, "snapshot_tokens": 1}
        least |= {k: 1 for k in ("n", "neurons_per_token") if getattr(self, k) is not None}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise UserError(f"{name}: expected {bound} or more, got {getattr(self, name)}")
        if self.seed >= 2**63:
            raise UserError(f"seed: expected less than 2**63, got {self.seed}")
        if self.split is not None and self.data is None:
            raise UserError(
                f"split: {self.split!r} is given without data; pass --data too, or leave out "
                "--split to read the run's held-out data"
            )
        kinds = tuple(self.kinds)
        if not kinds or set(kinds) - set(KINDS) or len(set(kinds)) < len(kinds):
            raise UserError(
                f"kinds: expected one or more of {', '.join(KINDS)}, each once, got "
                f"{', '.join(kinds) or 'none'}"
            )
        object.__setattr__(self, "kinds", tuple(kind for kind in KINDS if kind in kinds))

    @property
    def width(self) -> int:
        """Number of tokens of a window, W."""
        return self.before + 1 + self.after


class Shard(NamedTuple):
    """Part ``i`` of ``n`` parts of the texts, counted from 0."""

    i: int = 0
    n: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Parse a shard that is written as ``i/n``.

        Raises:
            UserError: the text does not have this form, or i is not below n.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None:
            raise UserError(f"--shard: expected i/n, such as 0/3, got {text!r}")
        return cls(int(match[1]), int(match[2])).checked()

    def checked(self) -> Shard:
        """Return the shard itself; raise ``UserError`` unless 0 <= i < n."""
        if not 0 <= self.i < self.n:
            raise UserError(
                f"--shard: expected i/n with i from 0 to n - 1 (0/3, 1/3, 2/3), got "
                f"{self.i}/{self.n}"
            )
        return self
