"""Where a response falls into a loop, found token by token.

In every window of ``window`` tokens the coverage of an n-gram is ``n · count / window``, where
``count`` is the largest number of its occurrences in the window that do not overlap. The window is
degenerate where some n-gram of some ``n`` of the set occurs at least ``min_count`` times and covers
more than ``share`` of it. A response is cut at the left edge of its earliest degenerate window, and
is scored as the text before the cut (arXiv 2602.20904; the set of n is not in the public text).

What the rule sees. An n-gram needs ``m_n = max(min_count, ⌊share·window/n⌋ + 1)`` occurrences. At
200 tokens and a quarter that is 26 for n=2, 17 for 3, 11 for 5, 6 for 10, 4 for 15 and 3 for 20;
from n=26 on two would do and above n=50 one, which is why there is a ``min_count``. A loop of
period p repeats an n-gram every p tokens, and one longer than p without overlap at the next
multiple of p, so n sees it if ``(m_n - 1) · p·⌈n/p⌉ + n ≤ window``: n=24 up to a period of 88, n=10
up to 38, n=5 up to 19, n=2 up to 7. Short periods need no small n: what a small n adds is endurance
of noise, since fewer tokens in a row must be the same.

What it costs. Where digits are single tokens, as in Qwen's tokenizer, the separators of a table or
a list ("| 0.3 | 0.4", "3, 7, 12") are n-grams of two to four tokens that cover most of it, and two
of them with one digit between are one of seven to nine: n=2 takes two sound tables in three for a
loop, {2..10, 15, 20} likewise, {5..10, 15, 20} one table in 25. An equation of 11
to 20 tokens that is stated three to six times covers a quarter as well; at n=24, which needs three
occurrences, it must be longer and stated thrice within a window. The default {10, 24} keeps what
sees the long loops and what sees the others in most noise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from fastadapt.errors import UserError


@dataclass(frozen=True)
class DegenerationConfig:
    """The rule; see the module for its arithmetic.

    Args:
        window: tokens of a window.
        share: of a window; an n-gram that covers more of it makes it degenerate.
        ngrams: lengths of the n-grams that are counted.
        min_count: occurrences that an n-gram needs at least.
    """

    window: int = 200
    share: float = 0.25
    ngrams: tuple[int, ...] = (10, 24)
    min_count: int = 3

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UserError(f"degeneration.window: expected 1 or more, got {self.window}")
        if not 0 < self.share < 1:
            raise UserError(f"degeneration.share: expected between 0 and 1, got {self.share}")
        if self.min_count < 2:
            raise UserError(f"degeneration.min_count: expected 2 or more, got {self.min_count}")
        bad = [n for n in self.ngrams if not 1 <= n <= self.window]
        if bad or not self.ngrams:
            raise UserError(
                f"degeneration.ngrams: expected lengths of 1 to {self.window}, got {self.ngrams}"
            )

    def needed(self, n: int) -> int:
        """m_n: occurrences apart that make a window degenerate; integers only, no rounding."""
        count = 1
        while n * count <= self.share * self.window:
            count += 1
        return max(self.min_count, count)


class DegenerationDetector:
    """Takes the tokens of one response and tells when the first degenerate window is complete.

    Time per token does not grow with the response. N-grams are kept as they are, so that no hash
    can take one for another, and only those of the last window; one that is not yet degenerate has
    at most ``(m_n - 1) · n`` starts in a window, which is what a count walks over.

    Only whole windows count: a response shorter than a window is never cut.
    """

    def __init__(self, config: DegenerationConfig | None = None) -> None:
        self.config = config or DegenerationConfig()
        self.cut: int | None = None  #: tokens before the first degenerate window, once there is one
        self.steps = 0  #: n-grams dropped, entered and walked over: the work done, for its test
        self._needed = [(n, self.config.needed(n)) for n in self.config.ngrams]
        self._tokens: list[int] = []
        # Per n: the starts of each n-gram within the last window, oldest first.
        self._starts: list[dict[tuple[int, ...], deque[int]]] = [{} for _ in self._needed]
        self._enough = False

    def feed(self, token: int) -> bool:
        """Take the next token; True as soon as a degenerate window is complete, and from then."""
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
            of_this = starts.setdefault(tuple(tokens[first:]), deque())
            of_this.append(first)
            self.steps += 1
            # A window can only turn degenerate by an n-gram that ends with it.
            if len(of_this) >= needed and self._apart(of_this, n) >= needed:
                self._enough = True
        # What is enough before the first window is complete is enough in it.
        if self._enough and left >= 0:
            self.cut = left
        return self.cut is not None

    def _apart(self, starts: deque[int], n: int) -> int:
        """The largest number of these occurrences that do not overlap: greedy, from the right."""
        count, last = 0, starts[-1] + n
        for start in reversed(starts):
            self.steps += 1
            if last - start >= n:
                count, last = count + 1, start
        return count


def find_cut(tokens: Iterable[int], config: DegenerationConfig | None = None) -> int | None:
    """Tokens before the earliest degenerate window of a whole response, None where there is none.

    Args:
        tokens: ids of the response without its prompt.
        config: the rule.
    """
    detector = DegenerationDetector(config)
    for token in tokens:
        if detector.feed(token):
            break
    return detector.cut
