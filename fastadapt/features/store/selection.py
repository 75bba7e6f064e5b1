"""Selecting features: by what they promote, where they fire, what they are, at random.

Every way is one SELECT over the store, asked through DuckDB on a connection that reads the store
and nothing else (:meth:`fastadapt.features.store.store.Store.connect`), so whatever a user writes
as SQL of his own is no more and no less able. The criteria are those of arXiv 2602.20904: a token
among the ten that a feature's output row promotes most (hesitation), and a place of its strongest
examples that 80% of them share (template).
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log
from typing import Any, ClassVar, get_args

from fastadapt.data.prepare.filter_pass import text_or_none
from fastadapt.errors import UserError
from fastadapt.evaluation.benchmarks.grading import HESITATION_WORDS
from fastadapt.features.store.schema import MARKERS, Region
from fastadapt.features.store.sets import FeatureSet, load_set
from fastadapt.features.store.store import Store

#: Tokens that a row of lens.parquet holds.
LENS_TOKENS = 10
#: Two densities match that are at most this factor apart.
SAME_DENSITY = 2**0.5


@dataclass(frozen=True)
class SelectConfig:
    """How a set is selected: by exactly one of the ways down to ``difference``.

    Args:
        hesitation: features that promote one of the words that evaluation counts as hesitation.
        promotes: features that promote one of these tokens, compared stripped and in lower case.
        template: features whose strongest examples stand at the template's markers.
        at: features whose strongest examples stand in one of these regions.
        before: features whose strongest examples stand directly before one of these tokens.
        classes: features of one of these classes or subclasses.
        sql: a SELECT of ``layer`` and ``feature`` over the tables of the store.
        random: the name of a set, like which features are drawn that are not in it.
        union, intersection, difference: names of sets; of these the first without others.
        top: promoted tokens that count, of 10.
        share: of the strongest examples that must be so, for ``template``, ``at`` and ``before``.
        times: how many times as many as the set has are drawn.
        seed: of the draw.
        alive: only features that fired on the texts of the store.
    """

    hesitation: bool = False
    promotes: tuple[str, ...] = ()
    template: bool = False
    at: tuple[Region, ...] = ()
    before: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    sql: str | None = None
    random: str | None = None
    union: tuple[str, ...] = ()
    intersection: tuple[str, ...] = ()
    difference: tuple[str, ...] = ()
    top: int = LENS_TOKENS
    share: float = 0.8
    times: int = 1
    seed: int = 0
    alive: bool = False

    WAYS: ClassVar[tuple[str, ...]] = (
        "hesitation",
        "promotes",
        "template",
        "at",
        "before",
        "classes",
        "sql",
        "random",
        "union",
        "intersection",
        "difference",
    )

    def __post_init__(self) -> None:
        chosen = [way for way in self.WAYS if getattr(self, way)]
        if len(chosen) != 1:
            got = ", ".join(chosen) or "none"
            raise UserError(
                f"a set is selected in one way: expected one of {', '.join(self.WAYS)}; got {got}. "
                "Name the sets, and combine them (union, intersection, difference)."
            )
        for region in self.at:
            if region not in get_args(Region):
                known = ", ".join(get_args(Region))
                raise UserError(f"at: expected some of {known}; got {region!r}")
        if not 1 <= self.top <= LENS_TOKENS:
            raise UserError(f"top: expected 1 to {LENS_TOKENS} tokens, got {self.top}")
        if not 0 < self.share <= 1:
            raise UserError(f"share: expected more than 0, at most 1, got {self.share}")
        if self.times < 1:
            raise UserError(f"times: expected 1 or more, got {self.times}")


def select(store: Store, config: SelectConfig) -> FeatureSet:
    """The features of the store's adapter that ``config`` selects; it is not kept yet.

    Raises:
        UserError: DuckDB is not installed, a table or a set is not there, the SQL is no SELECT of
            features, or there are too few others to draw from.
    """
    found = _select(store, config)
    return found & alive(store) if config.alive else found


def _select(store: Store, config: SelectConfig) -> FeatureSet:
    if config.hesitation or config.promotes:
        return promoting(store, config.promotes or HESITATION_WORDS, config.top)
    if config.template or config.at:
        return standing_at(store, config.at or MARKERS, config.share)
    if config.before:
        return preceding(store, config.before, config.share)
    if config.classes:
        return of_class(store, config.classes)
    if config.sql is not None:
        return by_sql(store, config.sql)
    if config.random is not None:
        return matched(store, load_set(store, config.random), config.times, config.seed)
    sets = [load_set(store, name) for name in config.union or config.intersection]
    if sets:
        found = sets[0]
        for other in sets[1:]:
            found = found | other if config.union else found & other
        return found
    first, *others = (load_set(store, name) for name in config.difference)
    for other in others:
        first = first - other
    return first


def promoting(
    store: Store, words: Sequence[str] = HESITATION_WORDS, top: int = LENS_TOKENS
) -> FeatureSet:
    """Features with one of ``words`` among their ``top`` promoted tokens.

    Tokens and words are compared without spaces around them and in lower case.
    """
    rows = _ask(
        store,
        "SELECT layer, feature FROM lens WHERE list_has_any(list_transform("
        "promoted_tokens[1:?], lambda token: lower(trim(token, ?))), ?)",
        [top, _SPACES, _plain(words)],
    )
    return _set(store, rows, f"promotes {', '.join(words)} (top {top})")


def standing_at(
    store: Store, regions: Sequence[Region] = MARKERS, share: float = 0.8
) -> FeatureSet:
    """Features of whose strongest examples at least ``share`` stand in one of ``regions``."""
    rows = _ask(
        store,
        "SELECT layer, feature FROM examples WHERE sample = 'top' GROUP BY layer, feature "
        "HAVING avg(list_contains(?, region)::INT) >= ?",
        [list(regions), share],
    )
    return _set(store, rows, f"at {', '.join(regions)} (share {share:g})")


def preceding(store: Store, words: Sequence[str], share: float = 0.8) -> FeatureSet:
    """Features of whose strongest examples at least ``share`` stand right before one of ``words``.

    Compared as in :func:`promoting`. A text's last token stands before none.
    """
    rows = _ask(
        store,
        "SELECT layer, feature FROM examples LEFT JOIN tokens "
        'ON tokens.token = examples.tokens[position - "start" + 2] '
        "WHERE sample = 'top' GROUP BY layer, feature HAVING "
        "avg(coalesce(list_contains(?, lower(trim(string, ?))), false)::INT) >= ?",
        [_plain(words), _SPACES, share],
    )
    return _set(store, rows, f"before {', '.join(words)} (share {share:g})")


def of_class(store: Store, classes: Sequence[str]) -> FeatureSet:
    """Features that a judge put into one of the classes or subclasses."""
    if not store.has("classes"):
        raise UserError(f"{store.folder} has no classes yet (fastadapt features classify)")
    rows = _ask(
        store,
        "SELECT layer, feature FROM classes WHERE list_contains(?, class) "
        "OR list_contains(?, subclass)",
        [list(classes), list(classes)],
    )
    return _set(store, rows, f"class {', '.join(classes)}")


def by_sql(store: Store, query: str) -> FeatureSet:
    """Features that a SELECT gives, in its columns ``layer`` and ``feature``.

    Raises:
        UserError: it is not one SELECT, does not run, or gives something else.
    """
    return _set(store, _ask(store, query), f"sql {' '.join(query.split())}")


def alive(store: Store) -> FeatureSet:
    """Features that fired on the texts of the store."""
    rows = _ask(store, "SELECT layer, feature FROM features WHERE count > 0")
    return _set(store, rows, "alive")


def matched(store: Store, like: FeatureSet, times: int = 1, seed: int = 0) -> FeatureSet:
    """At random, ``times`` as many features as ``like`` has, of the same densities, none of them
    in it.

    For each of its features, in random order and ``times`` over, one is drawn without replacement
    from those whose density is within a factor of √2 of its own, with equal chance; where none is
    left, the nearest in log density is taken. Features of any layer are drawn. One that never
    fired matches its like.

    Raises:
        UserError: there are too few others.
    """
    like.not_empty()
    wanted = times * len(like)
    rows = _ask(store, "SELECT layer, feature, density FROM features ORDER BY layer, feature")
    _require_all(store, like, rows)
    least = min((density for *_, density in rows if density > 0), default=1.0)
    # A feature that never fired is put two octaves below the rarest that did.
    size = {(layer, i): log(density or least / 4) for layer, i, density in rows}
    free = sorted((size[pair], pair) for pair in size if pair not in like._pairs())
    if wanted > len(free):
        raise UserError(
            f"{times} times {like.told} are {wanted} features, and there are {len(free)} others"
        )
    draw = random.Random(f"{seed}/{like.digest()}/{times}")
    order = list(like.features) * times
    draw.shuffle(order)
    drawn = []
    for pair in order:
        at = size[pair]
        low = bisect_left(free, (at - log(SAME_DENSITY),))
        high = bisect_left(free, (at + log(SAME_DENSITY), (1 << 62, 0)))
        if low < high:
            place = draw.randrange(low, high)
        else:
            near = (i for i in (low - 1, low) if 0 <= i < len(free))
            place = min(near, key=lambda i: abs(free[i][0] - at))
        drawn.append(free.pop(place)[1])
    return _set(store, drawn, f"random like ({like.made}), {times} times, seed {seed}")


def _require_all(store: Store, like: FeatureSet, rows: Sequence[tuple[Any, ...]]) -> None:
    """Refuse densities that are none, and a table without one of the set's features."""
    path = store.path("features")
    for layer, feature, density in rows:
        if not 0 <= density < inf:
            raise UserError(
                f"{path}: the column 'density': expected finite numbers from 0 on, got {density} "
                f"of feature {feature} of layer {layer}; collect the features again"
            )
    if lost := sorted(like._pairs() - {(layer, i) for layer, i, _ in rows}):
        layer, feature = lost[0]
        raise UserError(
            f"{path}: the columns 'layer', 'feature': expected feature {feature} of layer {layer}, "
            "got none; collect the features again"
        )


# --- asking ---------------------------------------------------------------------------------------

#: What is stripped from tokens; the library's own trim knows spaces alone.
_SPACES = " \t\r\n\v\f\u00a0"


def _plain(words: Sequence[str]) -> list[str]:
    if isinstance(words, str) or not words or not all(word.strip() for word in words):
        raise UserError(f"tokens: expected a list of words, got {words!r}")
    return [word.strip().lower() for word in words]


def _ask(store: Store, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
    """The rows of a SELECT; its first two columns are ``layer`` and ``feature``."""
    words = [word for value in values if isinstance(value, list) for word in value]
    for text in (query, *values, *words):
        if isinstance(text, str) and text_or_none(text) is None:
            raise UserError(f"expected text, got half a surrogate pair in {text!r:.80}")
    connection = store.connect("adapter")
    import duckdb

    try:
        statements = connection.extract_statements(query)
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            raise UserError(f"sql: expected one SELECT over the store's tables, got {query!r}")
        result = connection.execute(query, list(values))
        columns = [name for name, *_ in result.description or ()]
        if not {"layer", "feature"} <= set(columns):
            raise UserError(
                f"sql: expected the columns layer and feature, got {', '.join(columns)}"
            )
        rows = result.fetchall()
    # RuntimeError: what DuckDB raises where a file breaks its own expectations.
    except (duckdb.Error, RuntimeError, UnicodeDecodeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:300]
        raise UserError(
            f"sql: {reason} (in {store.folder}; fastadapt features check {store.folder} names "
            "files that are damaged)"
        ) from error
    finally:
        connection.close()
    first = columns.index("layer"), columns.index("feature")
    rest = [i for i in range(len(columns)) if i not in first]
    return [tuple(row[i] for i in (*first, *rest)) for row in rows]


def _set(store: Store, rows: Sequence[tuple[Any, ...]], made: str) -> FeatureSet:
    for layer, feature, *_ in rows:
        if type(layer) is not int or type(feature) is not int:
            raise UserError(
                f"{made}: expected whole numbers as layer and feature, got {layer!r}, {feature!r}"
            )
    try:
        return FeatureSet.of(
            (row[:2] for row in rows),
            adapter=str(store.manifest["adapter"]),
            shape=store.shape("adapter"),
            made=made,
        )
    except UserError as error:  # a row of a table, or of the SQL, that is of no feature
        raise UserError(f"columns layer and feature in {store.folder}: {error}") from None
