"""Schema of a store of features: its files, and the columns of each table.

A *unit* is a feature of the adapter, or a neuron of the base's or the target's MLP, collected in
the same way as a baseline. A store is a folder::

    manifest.json                  models, data, settings, counts, and SHA-256 of the files below
    texts.parquet                  the texts, a row each: their tokens, and the region of each
    tokens.parquet                 the vocabulary as strings
    adapter/, base/, target/       of each kind of unit that was collected:
        features.parquet             a row per unit: how often, how strongly, where
        examples.parquet             where each fires: strongest, and drawn uniformly
        lens.parquet                 the tokens that its output row promotes and suppresses
        scales.parquet               of features: how far the MLPs write the same
        descriptions.parquet, scores.parquet, classes.parquet, overlap.parquet,
        effects.parquet              once computed
    sets/NAME.json                 named sets of features
    calls/                         answers of judges, by a hash of the question
    judgements.json, judgements.md, judgements/   summary of the judges' answers: tables, plots
    site/                          the pages

Tables are sorted by (layer, feature) and readable by any Parquet reader. Layers and features count
from 0.
"""

from __future__ import annotations

from typing import Literal, get_args

import pyarrow as pa

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"

#: Features of the adapter; neurons of the base's and of the target's MLPs.
Kind = Literal["adapter", "base", "target"]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: Where a token stands in a rendered conversation.
Region = Literal[
    "bos",
    "user marker",
    "question",
    "assistant marker",
    "think start",
    "thinking",
    "think end",
    "answer",
]
REGIONS: tuple[Region, ...] = get_args(Region)
#: Regions that a template writes before a response, whatever the conversation.
MARKERS: tuple[Region, ...] = ("bos", "user marker", "assistant marker", "think start")
TENTHS = 10  # of the thinking, by position

#: Samples of a unit's activations: the strongest, and a uniform draw.
SampleKind = Literal["top", "uniform"]
SAMPLES: tuple[SampleKind, ...] = get_args(SampleKind)

#: Upper edges of the histogram's bins, in half octaves; the last bin has none.
EDGES: tuple[float, ...] = tuple(2.0 ** (i / 2) for i in range(-20, 21))

_UNIT = [pa.field("layer", pa.int32(), False), pa.field("feature", pa.int32(), False)]
_COUNTS = pa.list_(pa.int64())

#: A row per unit, units that never fired included.
FEATURES = pa.schema(
    [
        *_UNIT,
        pa.field("count", pa.int64(), False),  # tokens at which it is active
        pa.field("density", pa.float64(), False),  # count over all tokens
        pa.field("max", pa.float32(), False),  # 0 where it never fired
        pa.field("mean", pa.float32(), False),  # over the tokens at which it is active; 0 of none
        pa.field("norm", pa.float32(), False),  # of its output row
        pa.field("histogram", _COUNTS, False),  # activations by size: len(EDGES) + 1 bins
        pa.field("by_domain", _COUNTS, False),  # active tokens, in the order of manifest.domains
        pa.field("by_region", _COUNTS, False),  # in the order of REGIONS
        pa.field("by_tenth", _COUNTS, False),  # of the thinking
    ]
)

#: A row per stored activation, sorted by (layer, feature, sample, rank).
EXAMPLES = pa.schema(
    [
        *_UNIT,
        pa.field("sample", pa.string(), False),  # SAMPLES
        pa.field("rank", pa.int32(), False),  # 0 for the strongest; of uniform ones, the draw
        pa.field("text", pa.int32(), False),  # row of texts.parquet
        pa.field("position", pa.int32(), False),  # of the token in its text
        pa.field("value", pa.float32(), False),  # the activation there
        pa.field("token", pa.int32(), False),  # id of the token there
        pa.field("region", pa.string(), False),  # REGIONS
        pa.field("domain", pa.string()),
        pa.field("start", pa.int32(), False),  # position of the window's first token
        pa.field("tokens", pa.list_(pa.int32()), False),  # the window
        pa.field("values", pa.list_(pa.float32()), False),  # this unit's activation at each
        pa.field("priority", pa.int64(), False),  # seeded; the uniform draw is the top by it
    ]
)

#: ``lm_head @ W_dec,i``: the ten largest and the ten smallest.
LENS = pa.schema(
    [
        *_UNIT,
        pa.field("promoted", pa.list_(pa.int32()), False),  # token ids, strongest first
        pa.field("promoted_logits", pa.list_(pa.float32()), False),
        pa.field("promoted_tokens", pa.list_(pa.string()), False),
        pa.field("suppressed", pa.list_(pa.int32()), False),
        pa.field("suppressed_logits", pa.list_(pa.float32()), False),
        pa.field("suppressed_tokens", pa.list_(pa.string()), False),
    ]
)

TEXTS = pa.schema(
    [
        pa.field("text", pa.int32(), False),
        pa.field("id", pa.string(), False),
        pa.field("domain", pa.string()),
        pa.field("tokens", pa.list_(pa.int32()), False),
        pa.field("regions", pa.list_(pa.int8()), False),  # index into REGIONS, of each token
    ]
)

TOKENS = pa.schema([pa.field("token", pa.int32(), False), pa.field("string", pa.string(), False)])

#: A judge's description of a unit; a row per sample of examples shown.
DESCRIPTIONS = pa.schema(
    [
        *_UNIT,
        pa.field("variant", pa.string(), False),  # SAMPLES: the sample that the judge was shown
        pa.field("description", pa.string(), False),
        pa.field("judge", pa.string(), False),
        pa.field("shown", pa.list_(pa.int32()), False),  # ranks of the examples shown
    ]
)

#: Detection scores: given the description, a judge says on which texts the unit fires.
SCORES = pa.schema(
    [
        *_UNIT,
        pa.field("variant", pa.string(), False),
        pa.field("judge", pa.string(), False),
        pa.field("positives", pa.int32(), False),  # scored texts on which the unit fires
        pa.field("negatives", pa.int32(), False),  # ... and on which it does not
        pa.field("true_positives", pa.int32(), False),
        pa.field("true_negatives", pa.int32(), False),
        pa.field("accuracy", pa.float64(), False),
    ]
)

CLASSES = pa.schema(
    [
        *_UNIT,
        pa.field("judge", pa.string(), False),
        pa.field("class", pa.string(), False),
        pa.field("subclass", pa.string()),
        pa.field("reason", pa.string(), False),
    ]
)

#: arXiv 2602.20904, appendix G.
OVERLAP = pa.schema(
    [
        *_UNIT,
        pa.field("target", pa.float64(), False),  # agreement when the encoder reads the target
        pa.field("base", pa.float64(), False),  # ... and when it reads the base
    ]
)

#: Effect of a feature on the output: the rise of the KL to the target without the feature.
EFFECTS = pa.schema(
    [
        *_UNIT,
        pa.field("delta_kl", pa.float64(), False),  # nats per predicted token; may be negative
        pa.field("positions", pa.int64(), False),  # predicted tokens, on which it is a mean
    ]
)

#: How far the MLPs already write what a feature writes: see fastadapt.features.store.scales. A
#: feature without scales has no row.
SCALES = pa.schema(
    [
        *_UNIT,
        pa.field("base_share", pa.float64(), False),  # share in the base, -1 to 1
        pa.field("base_scale", pa.float64(), False),  # what the base's MLP writes / the feature
        pa.field("target_scale", pa.float64(), False),  # ... and the target's
        pa.field("difference_scale", pa.float64(), False),  # what the other features leave over
        pa.field("positions", pa.int64(), False),  # active tokens, but the first of each text
    ]
)

#: Tables of each kind of unit, by file name without its ending.
TABLES = {
    "features": FEATURES,
    "examples": EXAMPLES,
    "lens": LENS,
    "descriptions": DESCRIPTIONS,
    "scores": SCORES,
    "classes": CLASSES,
    "overlap": OVERLAP,
    "effects": EFFECTS,
    "scales": SCALES,
}
SHARED = {"texts": TEXTS, "tokens": TOKENS}
#: The ``TABLES`` that every collection writes and the manifest lists.
COLLECTED = ("features", "examples", "lens")
