"""Print the arguments of the runs of ``reproduce/runs`` that depend on finished ones.

    python reproduce/matching.py FOLDER

Comparisons at equal λ confound a setting with the L0 that it leads to. Each run named in ``PILOTS``
is therefore repeated with the λ at which its L0 is expected to be that of ``TARGET``. Its L0 as a
function of λ is taken to be that of the sweep, shifted along log λ through the pilot's own point;
between points of the sweep log λ is interpolated linearly in log L0, beyond them extrapolated. The
matched λ differs from the pilot's by a factor of LIMIT at most.

The paper refits norms on 1M tokens, of 50,000 texts of 7,600 tokens on which its adapters are
trained: a 380th. ``norms-scaled`` gets the same share of the training tokens of ``TARGET``, one
sequence a step.

This file imports no package, so that it starts at once.
"""

from __future__ import annotations

import json
import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

#: The run whose L0 is matched, and whose training tokens are scaled.
TARGET = "sparsity-4.3e-3"
SWEEP = ("sparsity-2.3e-1", "sparsity-1e-1", "sparsity-3.7e-2", "sparsity-1.2e-2", TARGET)
#: Runs to repeat at the L0 of TARGET, and their overlay.
PILOTS = ("whole-mlp", "no-bridge")
#: Largest factor between the λ of a pilot and the matched one.
LIMIT = 100
#: Seeds of runs that are repeated; the first is that of the preset.
SEEDS = (42, 1, 2)
#: Tokens of the training of adapters per token of the refit of norms.
PAPER_SHARE = 50_000 * 7_600 / 1_000_000


def matched_sparsity(
    sweep: list[tuple[float, float]], pilot: tuple[float, float], l0: float
) -> float:
    """Return the λ at which a pilot's L0 is expected to be ``l0``, to three digits.

    Args:
        sweep: pairs (λ, L0) of the sweep, in any order.
        pilot: λ and L0 of the pilot.
        l0: the L0 to reach.

    Example:
        >>> sweep = [(0.1, 1.0), (0.01, 10.0)]  # L0 = 0.1 / λ
        >>> matched_sparsity(sweep, (0.01, 5.0), 10.0)
        0.005
    """
    curve = sorted((math.log(count), math.log(weight)) for weight, count in sweep)
    shift = math.log(pilot[0]) - _interpolated(curve, math.log(pilot[1]))
    matched = _interpolated(curve, math.log(l0)) + shift - math.log(pilot[0])
    limited = min(max(matched, -math.log(LIMIT)), math.log(LIMIT))
    return float(f"{pilot[0] * math.exp(limited):.3g}")


def _interpolated(curve: list[tuple[float, float]], x: float) -> float:
    (x0, y0), (x1, y1) = next(
        ((a, b) for a, b in pairwise(curve) if x <= b[0]), (curve[-2], curve[-1])
    )
    return y0 + (x - x0) * (y1 - y0) / (x1 - x0) if x1 > x0 else y0


def scaled_steps(tokens: int, tokens_per_sequence: float) -> int:
    """Return the steps of one sequence that have the paper's share of training tokens.

    Example:
        >>> scaled_steps(831_016, 86.6)
        25
    """
    return max(1, round(tokens / PAPER_SHARE / tokens_per_sequence))


def runs(folder: Path) -> list[str]:
    """Return a line for each run: its name and the arguments of ``fastadapt train organism``."""
    cards = {name: _metadata(folder, name) for name in (*SWEEP, *PILOTS)}
    points = {
        name: (card["objective"]["sparsity"], card["measured"]["l0_mean"])
        for name, card in cards.items()
    }
    lines = []
    for pilot in PILOTS:
        weight = matched_sparsity([points[n] for n in SWEEP], points[pilot], points[TARGET][1])
        for seed in SEEDS:
            name = f"{pilot}-matched" + ("" if seed == SEEDS[0] else f"-seed{seed}")
            typed = "" if seed == SEEDS[0] else f" --run.seed {seed}"
            lines.append(f"{name} {pilot} --objective.sparsity {weight:g}{typed}")
    log = folder / TARGET / "metrics.jsonl"
    first = json.loads(log.read_text(encoding="utf-8").partition("\n")[0])
    each = first["epoch_tokens"] / first["sequences"]
    steps = scaled_steps(cards[TARGET]["measured"]["tokens"], each)
    one = "--optimizer.batch_size 1 --optimizer.epochs 1"
    return [*lines, f"norms-scaled norms {one} --optimizer.max_steps {steps}"]


def _metadata(folder: Path, run: str) -> dict[str, Any]:
    card = folder / run / "adapter" / "fastadapt.json"
    if not card.is_file():
        sys.exit(f"{card}: expected a finished run; train it: reproduce/runs {folder} 1 {run}")
    metadata: dict[str, Any] = json.loads(card.read_text(encoding="utf-8"))["metadata"]
    if not metadata["measured"]["l0_mean"] > 0:
        sys.exit(f"{card}: expected an L0 above 0, got {metadata['measured']['l0_mean']}")
    return metadata


if __name__ == "__main__":
    print("\n".join(runs(Path(sys.argv[1]))))
