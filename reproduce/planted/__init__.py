"""A benchmark of planted differences: which methods of diffing name what fine-tuning changed?

:mod:`.differences` draws eight differences from a seed, and writes texts in which their places are
known. :mod:`.organisms` fine-tunes the embedded pair's base on them, and, as a null, on more of its
own data. :mod:`.reading` reads texts with the models, and :mod:`.units` lists what a reader of each
method would look at, best first; :mod:`.measure` writes that down. :mod:`.judge` decides which
difference a unit describes; :mod:`.scores` counts, with the :mod:`.intervals` of :mod:`.tables`.
"""
