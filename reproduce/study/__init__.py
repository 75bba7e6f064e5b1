"""The study: what hesitation and template features do, shown by switching them.

After arXiv 2602.20904, section 5. Selected are features that promote a hesitation word, and those
whose strongest examples stand at the template's markers. They are *removed* from the replacement
model, *added* to the hybrid (all others removed), and *transferred*: put onto the target with a
negative scale. Beside each stand random sets, matched in density, of as many and of ten times as
many features; and each kind of features alone, to see what is whose. Measured are hesitation words
per 1,000 tokens, length and accuracy on the pair's benchmarks, with the sampling, judging and
intervals of ``fastadapt eval``.

What counts as promoting depends on the vocabulary: ten of 152,000 tokens are a rare distinction,
ten of the embedded pair's 424 are every second feature's. Its first selection is therefore by the
one most promoted token; the paper's ten are the second. Where ten times as many features are
more than half of the others, the larger control is as many times the set as that half holds.

Interventions are live here (:func:`fastadapt.interventions.scale_features`): one pair in memory, no
file per arm, and in float32 the same bits as saved ones.
"""
