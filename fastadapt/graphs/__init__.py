"""Attribution graphs: which tokens, features and biases a prediction came from, and by which paths.

:mod:`.linear.rules` makes a model linear in its inputs without changing its outputs,
:mod:`.linear.trace` runs a text through it, :mod:`.attribution` reads edges from gradients, and
:mod:`.files` saves graphs.
"""
