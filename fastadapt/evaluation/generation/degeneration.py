"""Detects where a response falls into a loop, token by token.

In a window of ``window`` tokens, the coverage of an n-gram is ``n · count / window``, where
``count`` is the largest number of its non-overlapping occurrences. A window is degenerate if an
n-gram, with n in ``ngrams``, occurs at least ``min_count`` times and covers more than ``share`` of
it. A response is cut at the left edge of its earliest degenerate window, and the text before the
cut is scored (arXiv 2602.20904, which does not publish its set of n).

Sensitivity. An n-gram needs ``m_n = max(min_count, ⌊share·window/n⌋ + 1)`` occurrences. For the
defaults (window 200, share 1/4, min_count 3) these are 26 for n=2, 17 for 3, 11 for 5, 6 for 10,
4 for 15 and 3 for 20. Without ``min_count``, two occurrences would suffice from n=26, and one above
n=50. A loop of period p repeats an n-gram every p tokens, and occurrences that do not overlap are
``p·⌈n/p⌉`` tokens apart. So n detects the loop if ``(m_n - 1) · p·⌈n/p⌉ + n ≤ window``: n=24 up to
a period of 88, n=10 up to 38, n=5 up to 19, n=2 up to 7. Loops of short periods do not need a small
n. A small n tolerates more noise in a loop, since fewer consecutive tokens must be equal.

False positives. Where digits are single tokens, as in Qwen's tokenizer, the separators of a table
or list ("| 0.3 | 0.4", "3, 7, 12") are n-grams of two to four tokens that cover most of it. Two
separators with a digit between them are n-grams of seven to nine tokens. In our tests, n=2 and
{2..10, 15, 20} took two sound tables in three for a loop, {5..10, 15, 20} one in 25. An equation of
11 to 20 tokens that is stated three to six times also covers a quarter of a window. With n=24 an
equation is taken for a loop only if it has 24 tokens or more and is stated three times in a window.
The default {10, 24} detects long loops by n=24, and noisy loops by n=10.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from fastadapt.errors import UserError


@dataclass(frozen=True)
class DegenerationConfig:
    """Settings of the rule; the head of the module explains their effect.

    Args:
        window: tokens per window.
        share: coverage above which an n-gram makes a window degenerate, between 0 and 1.
        ngrams: lengths of the n-grams that are counted.
        min_count: least number of occurrences of such an n-gram.
    """

    window: int = 200
    share: float = 0.25
    ngrams: tuple[int, ...] = (10, 24)
    min_count: int = 3

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UserError(f"degeneration.window: expected 1 or more, got {self.window}")
        if not 0 < self.share < 1:
            raise UserError(
                f"degeneration.share: expected more than 0 and less than 1, got {self.share}"
            )
        if self.min_count < 2:
            raise UserError(f"degeneration.min_count: expected 2 or more, got {self.min_count}")
        bad = [n for n in self.ngrams if not 1 <= n <= self.window]
        if bad or not self.ngrams:
            raise UserError(
                f"degeneration.ngrams: expected lengths of 1 to {self.window}, got {self.ngrams}"
            )

    def needed(self, n: int) -> int:
        """Return how often n tokens must occur in a window, without overlap, to count as a loop.

        The loop avoids the rounding of a division by n.

        Example:
            >>> [DegenerationConfig().needed(n) for n in (10, 24)]
            [6, 3]
        """
        count = 1
        while n * count <= self.share * self.window:
            count += 1
        return max(self.min_count, count)


class DegenerationDetector:
    """Detects the first degenerate window of one response while its tokens arrive.

    The time per token does not grow with the response: only n-grams of the last window are stored,
    and a count visits at most ``(m_n - 1) · n`` starts, the most that a window has without being
    degenerate. N-grams are compared by their tokens, not by a hash that could collide.

    Only complete windows count, so a response shorter than a window is never cut.

    Attributes:
        cut: tokens before the first degenerate window; None if none was detected.
        steps: number of n-grams removed, added and visited, for tests of the running time.
    """

    def __init__(self, config: DegenerationConfig | None = None) -> None:
        self.config = config or DegenerationConfig()
        self.cut: int | None = None
        self.steps = 0
        self._needed = [(n, self.config.needed(n)) for n in self.config.ngrams]
        self._tokens: list[int] = []
        # Per n: the starts of each n-gram within the last window, oldest first.
        self._starts: list[dict[tuple[int, ...], deque[int]]] = [{} for _ in self._needed]
        self._enough = False

    def feed(self, token: int) -> bool:
        """Take the response's next token; return whether a degenerate window is complete."""
        if self.cut is not None:
            return True
        tokens = self._tokens
        tokens.append(token)
        left = len(tokens) - self.config.window  # edge of the window that ends here
        for (n, needed), starts in zip(self._needed, self._starts, strict=True):
            if left > 0:
                leaving = tuple(tokens[left - 1 : left - 1 + n])
                starts[leaving].popleft()
                if not starts[leaving]:
                    del starts[leaving]
                self.steps += 1
            first = len(tokens) - n
            if first < 0 or self._enough:
                continue
            occurrences = starts.setdefault(tuple(tokens[first:]), deque())
            occurrences.append(first)
            self.steps += 1
            # Only an n-gram that ends at the new token can make the window degenerate.
            if len(occurrences) >= needed and self._count_disjoint(occurrences, n) >= needed:
                self._enough = True
        # Occurrences before the first window is complete are all within that window.
        if self._enough and left >= 0:
            self.cut = left
        return self.cut is not None

    def _count_disjoint(self, starts: deque[int], n: int) -> int:
        """Return the largest number of non-overlapping occurrences: greedily, from the right."""
        count, last = 0, starts[-1] + n
        for start in reversed(starts):
            self.steps += 1
            if last - start >= n:
                count, last = count + 1, start
        return count


def find_cut(tokens: Iterable[int], config: DegenerationConfig | None = None) -> int | None:
    """Return the number of tokens before the earliest degenerate window; None without one.

    Args:
        tokens: ids of a complete response, without its prompt.
        config: settings of the rule.

    Example:
        >>> find_cut([*range(300), *list(range(60, 70)) * 30])
        160
    """
    detector = DegenerationDetector(config)
    for token in tokens:
        if detector.feed(token):
            break
    return detector.cut
