"""Select features: by name, promoted tokens, where they fire, class, SQL, or at random.

Each criterion but names is one SELECT over the store, on a DuckDB connection that reads only the
store (:meth:`fastadapt.features.store.store.Store.connect`). The criteria follow arXiv 2602.20904:
hesitation features have such a word among their ten most promoted tokens, and template features
have at least 80% of their strongest examples at one position of the template: BOS, a token of the
user's or the assistant's marker, ``<think>``, the line break after it, or the first token of the
reasoning.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import fsum, inf, log
from operator import and_, or_, sub
from typing import Any, ClassVar, get_args

import numpy as np
import pyarrow as pa

from fastadapt.data.prepare.filter_pass import text_or_none
from fastadapt.errors import UserError
from fastadapt.evaluation.benchmarks.grading import HESITATION_WORDS
from fastadapt.features.store.scales import COLUMNS, ORIGINS, Origin, origins
from fastadapt.features.store.schema import MARKERS, Region
from fastadapt.features.store.sets import FeatureSet, Pair, load_set, named, pair_of
from fastadapt.features.store.store import Store

#: Promoted tokens in a row of lens.parquet.
LENS_TOKENS = 10
#: Tokens of the longest marker of a template. Later tokens of a region count as one position.
_LONGEST_MARKER = 32
#: Largest factor between two densities that match.
SAME_DENSITY = 2**0.5


@dataclass(frozen=True)
class SelectConfig:
    """Criterion of a set: exactly one of ``features`` to ``difference``.

    Args:
        features: these features, each as LAYER/NUMBER, such as 2/17.
        hesitation: features that promote one of the words of hesitation.
        promotes: features that promote one of these tokens, compared stripped and in lower case.
        template: features whose strongest examples are at one position of the template, see
            :func:`on_template`.
        at: features whose strongest examples are in one of these regions.
        before: features whose strongest examples are directly before one of these tokens.
        classes: features of one of these classes or subclasses.
        origin: features that fine-tuning wrote so: new, strengthened, opposed or absent, see
            :mod:`fastadapt.features.store.scales`.
        sql: a SELECT of ``layer`` and ``feature`` over the tables of the store.
        random: name of a set; draws features of matched densities that are not in the set.
        union, intersection, difference: names of sets; ``difference`` is the first set without the
            others.
        top: number of promoted tokens that count, up to 10.
        share: share of the strongest examples that ``template``, ``at`` and ``before`` require.
        times: number of features drawn per feature of the set, for ``random``.
        seed: seed of the random draw.
        alive: only features that fired on the texts of the store.
    """

    features: tuple[str, ...] = ()
    hesitation: bool = False
    promotes: tuple[str, ...] = ()
    template: bool = False
    at: tuple[Region, ...] = ()
    before: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    origin: tuple[Origin, ...] = ()
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
        "features",
        "hesitation",
        "promotes",
        "template",
        "at",
        "before",
        "classes",
        "origin",
        "sql",
        "random",
        "union",
        "intersection",
        "difference",
    )

    def __post_init__(self) -> None:
        chosen = [name for name in self.WAYS if getattr(self, name)]
        if len(chosen) != 1:
            got = ", ".join(chosen) or "none"
            raise UserError(
                f"a set is selected in one way: expected one of {', '.join(self.WAYS)}; got {got}. "
                "To combine criteria, save one set for each, then select by union, intersection or "
                "difference."
            )
        for name in self.features:
            pair_of(name)
        for name, what, known in (
            ("at", "regions", get_args(Region)),
            ("origin", "origins", ORIGINS),
        ):
            for value in getattr(self, name):
                if value not in known:
                    raise UserError(
                        f"{name}: expected {what} among {', '.join(known)}; got {value!r}"
                    )
        if not 1 <= self.top <= LENS_TOKENS:
            raise UserError(f"top: expected 1 to {LENS_TOKENS} tokens, got {self.top}")
        if not 0 < self.share <= 1:
            raise UserError(f"share: expected more than 0, at most 1, got {self.share}")
        if self.times < 1:
            raise UserError(f"times: expected 1 or more, got {self.times}")


def select(store: Store, config: SelectConfig) -> FeatureSet:
    """Return the features of the store's adapter that ``config`` selects, without saving the set.

    Raises:
        UserError: DuckDB is not installed, a table or a set is missing, the SQL is not a SELECT of
            features, or too few features are left to draw from.
    """
    selected = _select(store, config)
    return selected & alive(store) if config.alive else selected


def _select(store: Store, config: SelectConfig) -> FeatureSet:
    if config.features:
        return named(store, config.features)
    if config.hesitation or config.promotes:
        return promoting(store, config.promotes or HESITATION_WORDS, config.top)
    if config.template:
        return on_template(store, config.share)
    if config.at:
        return standing_at(store, config.at, config.share)
    if config.before:
        return preceding(store, config.before, config.share)
    if config.classes:
        return of_class(store, config.classes)
    if config.origin:
        return of_origin(store, config.origin)
    if config.sql is not None:
        return by_sql(store, config.sql)
    if config.random is not None:
        return matched(store, load_set(store, config.random), config.times, config.seed)
    sets = [load_set(store, name) for name in config.union or config.intersection]
    if sets:
        return reduce(or_ if config.union else and_, sets)
    return reduce(sub, (load_set(store, name) for name in config.difference))


def promoting(
    store: Store, words: Sequence[str] = HESITATION_WORDS, top: int = LENS_TOKENS
) -> FeatureSet:
    """Return the features with one of ``words`` among their ``top`` promoted tokens.

    Tokens and words are compared stripped and in lower case.
    """
    rows = _ask(
        store,
        "SELECT layer, feature FROM lens WHERE list_has_any(list_transform("
        "promoted_tokens[1:?], lambda token: lower(trim(token, ?))), ?)",
        [top, _SPACES, _plain(words)],
    )
    return _set(store, rows, f"promotes {', '.join(words)} (top {top})")


def on_template(store: Store, share: float = 0.8) -> FeatureSet:
    """Return the features with at least ``share`` of their strongest examples at one position.

    The positions are those of a template before a response: each token of the regions ``MARKERS``,
    counted from the region's begin, and the first token of the reasoning.
    """
    rows = _ask(
        store,
        "WITH placed AS (SELECT layer, feature, examples.region AS place, list_position("
        "list_transform(range(?), lambda k: regions[greatest(position - k, 0)] IS DISTINCT FROM "
        "regions[position + 1]), true) AS nth FROM examples JOIN texts USING (text) "
        "WHERE sample = 'top' AND list_contains(?, examples.region)), "
        "counted AS (SELECT layer, feature, count(*) AS at_one FROM placed "
        "WHERE place <> 'thinking' OR nth = 1 GROUP BY layer, feature, place, nth), "
        "total AS (SELECT layer, feature, count(*) AS n FROM examples WHERE sample = 'top' "
        "GROUP BY layer, feature) "
        "SELECT DISTINCT layer, feature FROM counted JOIN total USING (layer, feature) "
        "WHERE at_one / n >= ?",
        [_LONGEST_MARKER, [*MARKERS, "thinking"], share],
    )
    return _set(store, rows, f"at one position of the template (share {share:g})")


def standing_at(store: Store, regions: Sequence[Region], share: float = 0.8) -> FeatureSet:
    """Return the features with at least ``share`` of their strongest examples in ``regions``."""
    rows = _ask(
        store,
        "SELECT layer, feature FROM examples WHERE sample = 'top' GROUP BY layer, feature "
        "HAVING avg(list_contains(?, region)::INT) >= ?",
        [list(regions), share],
    )
    return _set(store, rows, f"at {', '.join(regions)} (share {share:g})")


def preceding(store: Store, words: Sequence[str], share: float = 0.8) -> FeatureSet:
    """Return the features with at least ``share`` of their strongest examples before ``words``.

    An example counts if the token after it equals a word, compared as in :func:`promoting`.

    Raises:
        UserError: the store's examples end with the token of the activation.
    """
    if store.manifest["settings"].get("after") == 0:
        raise UserError(
            f"{store.folder}: its examples have no token after the activation (--after 0), so "
            "features before words are not known; collect the features again (fastadapt features "
            "collect --overwrite)"
        )
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
    """Return the features to which a judge gave one of the classes or subclasses."""
    if not store.has("classes"):
        raise UserError(f"{store.folder} has no classes yet; run fastadapt features classify")
    rows = _ask(
        store,
        "SELECT layer, feature FROM classes WHERE list_contains(?, class) "
        "OR list_contains(?, subclass)",
        [list(classes), list(classes)],
    )
    return _set(store, rows, f"class {', '.join(classes)}")


def of_origin(store: Store, chosen: Sequence[Origin]) -> FeatureSet:
    """Return the features of the given origins.

    Raises:
        UserError: the store has no scales.
    """
    rows = store.read("scales", columns=["layer", "feature", *COLUMNS])
    kinds = origins(*(rows[name].to_numpy() for name in COLUMNS))
    isin = np.isin(kinds, [ORIGINS.index(name) for name in chosen])
    pairs = rows.select(["layer", "feature"]).filter(pa.array(isin)).to_pylist()
    return _set(store, [tuple(pair.values()) for pair in pairs], f"origin {', '.join(chosen)}")


def by_sql(store: Store, query: str) -> FeatureSet:
    """Return the features in the columns ``layer`` and ``feature`` of a SELECT.

    Raises:
        UserError: the query is not a single SELECT, fails, or lacks these columns.
    """
    return _set(store, _ask(store, query), f"sql {' '.join(query.split())}")


def alive(store: Store) -> FeatureSet:
    """Return the features that fired on the texts of the store."""
    rows = _ask(store, "SELECT layer, feature FROM features WHERE count > 0")
    return _set(store, rows, "alive")


def matched(store: Store, like: FeatureSet, times: int = 1, seed: int = 0) -> FeatureSet:
    """Draw ``times`` features for each feature of ``like``, of matching density and not in it.

    The features of ``like``, each repeated ``times``, are matched in random order. Each match is
    drawn uniformly, without replacement and from all layers, among the features whose density is
    within a factor of √2; if none is left, the nearest in log density is taken. Features that
    never fired match each other.

    If ``like`` has much of what fires, few features of matching density are left: the drawn set
    then fires less often, and draws share most of their features. The expression of the drawn set
    therefore ends with its density as a share of ``like``'s, see :func:`density_shares`.

    Raises:
        UserError: ``like`` is empty, or too few other features exist.
    """
    like.not_empty()
    wanted = times * len(like)
    densities = _densities(store, like)
    least = min((density for density in densities.values() if density > 0), default=1.0)
    # Features that never fired are put two octaves below the rarest feature that did.
    log_density = {pair: log(density or least / 4) for pair, density in densities.items()}
    free = sorted((log_density[pair], pair) for pair in log_density if pair not in like)
    if wanted > len(free):
        raise UserError(
            f"{times} times {like.label}: expected {wanted} other features to draw, got "
            f"{len(free)}; lower times"
        )
    draw = random.Random(f"{seed}/{like.digest()}/{times}")
    order = list(like.features) * times
    draw.shuffle(order)
    drawn = []
    for pair in order:
        target = log_density[pair]
        # Tuples sort by log density, then pair: () and (1 << 62, 0) sort before and after any pair.
        low = bisect_left(free, (target - log(SAME_DENSITY),))
        high = bisect_left(free, (target + log(SAME_DENSITY), (1 << 62, 0)))
        if low < high:
            index = draw.randrange(low, high)
        else:
            nearest = (i for i in (low - 1, low) if 0 <= i < len(free))
            index = min(nearest, key=lambda i: abs(free[i][0] - target))
        drawn.append(free.pop(index)[1])
    expression = f"random like ({like.expression}), {times} times, seed {seed}"
    if (share := _density_share(densities, like, drawn)) is not None:
        expression += f", density {share:.2g} of the set's"
    return _set(store, drawn, expression)


def density_shares(
    store: Store, like: FeatureSet, drawn: Sequence[FeatureSet]
) -> list[float | None]:
    """Return the density of each set of ``drawn`` as a share of that of ``like``.

    Densities are summed over the features, and divided by the quotient of the sizes.

    Returns:
        A share for each set of ``drawn``, 1 if it fires as often as ``like``; None if ``like``
        never fired.
    """
    densities = _densities(store, like)
    return [_density_share(densities, like, each.features) for each in drawn]


def _density_share(
    densities: Mapping[Pair, float], like: FeatureSet, drawn: Sequence[Pair]
) -> float | None:
    whole, part = (fsum(densities[pair] for pair in pairs) for pairs in (like.features, drawn))
    return part / whole * len(like) / len(drawn) if whole else None


def _densities(store: Store, like: FeatureSet) -> dict[Pair, float]:
    """Return the density of every feature of the store, sorted by layer and number.

    Raises:
        UserError: a density is impossible, or a feature of ``like`` has no row.
    """
    rows = _ask(store, "SELECT layer, feature, density FROM features ORDER BY layer, feature")
    path = store.path("features")
    for layer, feature, density in rows:
        if not 0 <= density < inf:
            raise UserError(
                f"{path}: the column 'density': expected finite numbers from 0 on, got {density} "
                f"of feature {feature} of layer {layer}; collect the features again"
            )
    if missing := sorted(set(like) - {(layer, i) for layer, i, _ in rows}):
        layer, feature = missing[0]
        raise UserError(
            f"{path}: the columns 'layer', 'feature': expected feature {feature} of layer {layer}, "
            "got none; collect the features again"
        )
    return {(layer, i): density for layer, i, density in rows}


# --- queries --------------------------------------------------------------------------------------

#: Stripped from tokens; DuckDB's trim strips only spaces by default.
_SPACES = " \t\r\n\v\f\u00a0"


def _plain(words: Sequence[str]) -> list[str]:
    if isinstance(words, str) or not words or not all(word.strip() for word in words):
        raise UserError(f"expected a list of one or more tokens, none blank, got {words!r}")
    return [word.strip().lower() for word in words]


def _ask(store: Store, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
    """Run a SELECT and return its rows, with ``layer`` and ``feature`` as first columns."""
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
    # DuckDB raises RuntimeError when a damaged file breaks its internal assumptions.
    except (duckdb.Error, RuntimeError, UnicodeDecodeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:300]
        raise UserError(
            f"sql: {reason} (in {store.folder}; fastadapt features check {store.folder} names "
            "damaged files)"
        ) from error
    finally:
        connection.close()
    first = columns.index("layer"), columns.index("feature")
    others = [i for i in range(len(columns)) if i not in first]
    return [tuple(row[i] for i in (*first, *others)) for row in rows]


def _set(store: Store, rows: Sequence[tuple[Any, ...]], expression: str) -> FeatureSet:
    for layer, feature, *_ in rows:
        if type(layer) is not int or type(feature) is not int:
            raise UserError(
                f"{expression}: expected integers as layer and feature, got {layer!r}, {feature!r}"
            )
    try:
        return FeatureSet.from_pairs(
            (row[:2] for row in rows),
            adapter=str(store.manifest["adapter"]),
            shape=store.shape("adapter"),
            expression=expression,
        )
    except UserError as error:  # a row of a table or of the SQL names no feature of the adapter
        raise UserError(f"columns layer and feature in {store.folder}: {error}") from None
