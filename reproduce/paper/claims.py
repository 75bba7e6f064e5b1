"""The claims of arXiv 2602.20904, their numbers there, and the commands that measure them here.

The numbers of the paper are the only ones that are typed. Each has its section.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from reproduce.paper import evaluation, graphs, hesitation
from reproduce.paper.finding import Finding

Source = Literal["eval", "contrast", "study", "shares"]

REPRODUCE = "make reproduce"
#: Sets of the run that `make study` studies; `both` is their union.
CONTRAST = "fastadapt contrast RUN --features hesitation template both"
STUDY = "make study"
FULL = "needs full scale"
NOT_RUN = "not run"


@dataclass(frozen=True)
class Claim:
    """One row of the page.

    Attributes:
        section: where the paper has it; empty for a control that the paper lacks.
        text: the claim.
        paper: the paper's number, as text; empty without.
        command: the command that measures it.
        source: the file that the command writes; None for a claim that needs the paper's pair.
        measure: reads the file.
        without: what the page says without the file.
    """

    section: str
    text: str
    paper: str
    command: str
    source: Source | None = None
    measure: Callable[[Mapping[str, Any]], Finding | None] | None = None
    without: str = NOT_RUN


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "4.1",
        "Adapters are nearer to the target than base and hybrid, denser ones more so, and "
        "fine-tuned MLPs nearest (top-1 error)",
        "base 39.2%, hybrid 28.5%, L0 0.1: 13.6%, L0 10: 9.2%, fine-tuned MLPs 8.5%",
        REPRODUCE,
        "eval",
        evaluation.order,
    ),
    Claim(
        "4.2",
        "With part of the layers replaced, the KL is at most that of all layers replaced",
        "no part above the whole (figure 3)",
        REPRODUCE,
        "eval",
        evaluation.subsets,
    ),
    Claim(
        "4.2",
        "The KL decreases monotonically as more layers are the target's",
        "monotone (figure 3)",
        REPRODUCE,
        "eval",
        evaluation.monotone,
    ),
    Claim(
        "4.3",
        "Adapters recover much of the gain in accuracy over the base",
        "50 to 90%",
        REPRODUCE,
        "eval",
        evaluation.gain,
    ),
    Claim(
        "4.3",
        "Responses of adapters are as long as the target's",
        "lengths match (figure 4)",
        REPRODUCE,
        "eval",
        evaluation.lengths,
    ),
    Claim(
        "footnote 1",
        "Transcoders of whole MLPs need a larger L0: at that of adapters, their KL is larger",
        "L0 20 to 200 in other work, 0.1 to 10 for adapters",
        REPRODUCE,
        "eval",
        evaluation.against("whole-mlp-matched"),
    ),
    Claim(
        "B",
        "Refitting norms on 1M tokens does not help the hybrid",
        "accuracy 29.9%, hybrid 29.4%; no variant changes length",
        REPRODUCE,
        "eval",
        evaluation.refit("norms"),
    ),
    Claim(
        "B",
        "The same, on the paper's share of the adapters' training tokens (1M of 380M)",
        "accuracy 29.9%, hybrid 29.4%; no variant changes length",
        REPRODUCE,
        "eval",
        evaluation.refit("norms-scaled"),
    ),
    Claim(
        "B",
        "Examples in the prompt do not help the hybrid",
        "accuracy 14.7% at temperature 0, 16.3% at 0.7, zero-shot 29.4%",
        REPRODUCE,
        "eval",
        evaluation.few_shot,
    ),
    Claim(
        "C",
        "Without the bridge, adapters of the last layers alone are worse",
        "worse (appendix C)",
        REPRODUCE,
        "eval",
        evaluation.bridge,
    ),
    Claim(
        "D",
        "The hybrid's responses degenerate more often than those of adapters (table 3)",
        "target 0.2%, L0 10.3: 3.3%, L0 1.4: 8.3%, L0 0.1: 12.0%, hybrid 31.6%",
        REPRODUCE,
        "eval",
        evaluation.degenerate,
    ),
    Claim(
        "6.1",
        "Removing hesitation and template features removes P(wait) where it belongs by half",
        "70% fewer `wait` in samples",
        CONTRAST,
        "contrast",
        hesitation.cut("ablate", 0.5),
    ),
    Claim(
        "6.1",
        "Removing random features of matched density does not (at most 15%)",
        "random sets, of up to 50k features, do not",
        CONTRAST,
        "contrast",
        hesitation.cut("ablate", 0.15, random=True),
    ),
    Claim(
        "6.1",
        "The set alone brings P(wait) back where it belongs, beyond the adapter's bias",
        "8.2 `wait` per 1,000 tokens, unchanged adapter 5.5; the bias is no arm",
        CONTRAST,
        "contrast",
        hesitation.beyond_bias,
    ),
    Claim(
        "6.1",
        "The two kinds of features need each other: most of their effect arises only together",
        "hesitation alone 1.5, template alone 0.2, both 8.2 per 1,000 tokens",
        CONTRAST,
        "contrast",
        hesitation.interaction,
    ),
    Claim(
        "6.2",
        "Added to the target with the factor −0.5, the set reduces P(wait) where it belongs",
        "reduced at −0.5 (footnote 7)",
        CONTRAST,
        "contrast",
        hesitation.cut("onto-target", 0.0),
    ),
    Claim(
        "6.1",
        "Removing the set reduces `wait` in sampled responses",
        "70%",
        STUDY,
        "study",
        hesitation.removed(0),
    ),
    Claim(
        "6.1",
        "Removing random features of the same number does not",
        "random sets, of up to 50k features, do not",
        STUDY,
        "study",
        hesitation.removed(1),
    ),
    Claim(
        "6.1",
        "Removing the paper's selection (the ten most promoted tokens) reduces `wait`, too",
        "70%",
        STUDY,
        "study",
        hesitation.removed(0, hesitation.TEN),
    ),
    Claim(
        "6.1",
        "The set alone gives the hybrid as much `wait`; each kind and the bias alone do not",
        "both 8.2, adapter 5.5, hesitation alone 1.5, template alone 0.2 per 1,000 tokens",
        STUDY,
        "study",
        hesitation.added,
    ),
    Claim(
        "6.2",
        "Accuracy is unchanged without the set",
        "unchanged on three benchmarks; AIME25 26% to 20%",
        STUDY,
        "study",
        hesitation.unharmed,
    ),
    Claim(
        "6.2",
        "Accuracy is unchanged without the paper's selection (the ten most promoted tokens)",
        "unchanged on three benchmarks; AIME25 26% to 20%",
        STUDY,
        "study",
        partial(hesitation.unharmed, selection=hesitation.TEN),
    ),
    Claim(
        "6.2",
        "Added to the target with the factor −0.5, the set reduces `wait` in sampled responses",
        "reduced at −0.5 (footnote 7)",
        STUDY,
        "study",
        hesitation.transferred,
    ),
    Claim(
        "5.1",
        "Features are as easily described as, or more easily than, neurons (detection score)",
        "0.82 on strongest, 0.69 on uniform examples (appendix F)",
        "fastadapt features describe RUN",
    ),
    Claim(
        "5.2",
        "Few features are about reasoning",
        "8% of classified features",
        "fastadapt features classify RUN",
    ),
    Claim(
        "5.3",
        "`Wait` depends on few features (figure 8)",
        "attribution graphs of sampled responses",
        "fastadapt graph RUN --responses FILE --at wait",
    ),
    Claim(
        "5.3",
        "Hesitation features depend on few other features",
        "attribution graphs of sampled responses",
        "python -m reproduce.graphs shares RUN --out FOLDER/shares.json",
        "shares",
        graphs.shares,
        "not given; see [graphs](graphs.md)",
    ),
    Claim(
        "6.2",
        "Accuracy is unchanged on each benchmark without the set (figure 10)",
        "MATH-500, AMC23, GPQA-Diamond unchanged; AIME25 26% to 20%",
        STUDY,
        "study",
        hesitation.unharmed_by_benchmark,
    ),
    Claim(
        "",
        "At equal L0, adapters without the bridge have a larger KL with all layers replaced",
        "",
        REPRODUCE,
        "eval",
        evaluation.against("no-bridge-matched"),
    ),
    Claim(
        "",
        "A bias per layer, without any feature",
        "",
        REPRODUCE,
        "eval",
        evaluation.baseline("bias"),
    ),
    Claim(
        "",
        "A LoRA with as many parameters as adapters",
        "",
        REPRODUCE,
        "eval",
        evaluation.baseline("lora"),
    ),
)
