"""Study of hesitation and template features by interventions, after arXiv 2602.20904, section 5.

The selected features promote a hesitation word, or have their strongest examples at the template's
markers. They are *removed* from the replacement model, *added* to the hybrid (all other features
removed), and *transferred* to the target with a negative scale. Controls are random sets of equal
density, of the same size and of ten times the size, each of the two kinds of features alone, and
the hybrid with ``b_dec`` alone: what a set adds to the hybrid is measured over this bias, which
``only`` keeps. Prompts open the reasoning as the family's template does (``benchmarks.prefill``).
Otherwise features at the template's markers decide whether a model reasons at all.

The study measures hesitation words per 1,000 tokens, length and accuracy on the pair's benchmarks,
with the sampling, grading and intervals of ``fastadapt eval``.

The number of most promoted tokens that count depends on the vocabulary: ten of 152,000 tokens
select few features, but ten of the embedded pair's 424 select every second feature. The first
selection therefore uses the single most promoted token; the second uses the paper's ten. If ten
times the size exceeds half of the other features, the larger control is the largest multiple within
that half.

Interventions are applied in memory (:func:`fastadapt.interventions.scale_features`), so the study
needs one pair and no files per arm. In float32, results are bitwise equal to those of saved
interventions.
"""
