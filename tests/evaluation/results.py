"""A synthetic result of an evaluation: the sections of ``eval.json``, every kind of model."""

from __future__ import annotations

from typing import Any

#: Name, kind, variant, L0 and top-1 error.
MODELS = (
    ("base", "base", "", None, 0.42),
    ("hybrid", "hybrid", "", None, 0.24),
    ("sparse <b>&</b>", "transcoder", "", 0.3, 0.18),
    ("l0_10%", "transcoder", "", 10.0, 0.1),
    ("dense", "transcoder", "dense", 150.0, 0.06),
    ("no-bridge", "transcoder", "no-bridge", 2.5, 0.13),
    ("skyline", "mlp", "", None, 0.05),
    ("norms", "norms", "", None, 0.22),
)
LAYERS = 4


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": 0.9 * mean, "high": 1.1 * mean}


def measured(error: float) -> dict[str, Any]:
    return {
        "accuracy": interval(1 - error),
        "length": interval(48.0),
        "hesitations_per_1000": interval(11.0),
        "recovered": interval(1 - error),
        "recovered_from_base": None,
        "truncated": 0.01,
        "degenerate": 0.0,
        "tokens_per_s": 1234.5,
    }


def synthetic_result() -> dict[str, Any]:
    """Return the contents of an ``eval.json`` with all parts except speed."""
    result: dict[str, Any] = {
        "pair": {"target": "some/target", "base": "some/base"},
        "level": 0.95,
        "students": [],
        "faithfulness": {},
        "partial": {},
        "texts": {"n": 500, "n_partial": 100, "predicted": 20_000},
        "settings": {"seed": 0},
        "versions": {"torch": "2.13"},
        "order": [
            {
                "above": "base",
                "below": "hybrid",
                "holds": "yes",
                "top1_error": interval(0.18),
                "kl": interval(0.5),
            },
            {
                "above": "dense",
                "below": "skyline",
                "holds": "tie",
                "top1_error": {"mean": 0.01, "low": -0.01, "high": 0.03},
                "kl": interval(0.1),
            },
        ],
        "bridge": [
            {
                "without": "no-bridge",
                "with": "l0_10%",
                "last": [interval(0.1 * i) for i in range(LAYERS + 1)],
            }
        ],
        "benchmarks": {"sums": {"target": {"sampled": measured(0.29) | {"recovered": None}}}},
        "benchmark_counts": {"sums": "500 questions × 1"},
    }
    for name, kind, variant, l0, error in MODELS:
        result["students"].append(
            {"name": name, "kind": kind, "variant": variant, "l0": l0, "what": variant or kind}
        )
        per_layer = None
        if kind != "base":
            per_layer = [interval(error * i) for i in range(LAYERS + 1)]
            result["partial"][name] = {
                family: [interval(error * i) for i in range(LAYERS + (family != "single"))]
                for family in ("first", "last", "single")
            }
            result["partial"][name]["excess"] = {"worst": interval(-error)}
        region = {"kl": interval(error), "top1_error": interval(error), "positions": 99}
        undefined = {"mean": None, "low": None, "high": None}
        empty = {"kl": undefined, "top1_error": undefined, "positions": 0}
        result["faithfulness"][name] = {
            "kl": interval(5 * error),
            "top1_error": interval(error),
            "l0": l0,
            "regions": {"prompt": region, "thinking": region, "answer": empty},
            "domains": {"math": region},
            "by_position": {
                "edges": [0, 1, 2, 4],
                "kl": [interval(error), undefined, interval(error)],
            },
            "nmse_per_layer": per_layer,
            "nmse_token_per_layer": per_layer,
        }
        result["benchmarks"]["sums"][name] = {"sampled": measured(error)}
    return result
