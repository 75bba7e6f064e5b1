"""Options of training compared at equal L0: one table of recipes, on two pairs.

:mod:`.catalogue` reads ``recipes.yaml``, the list of recipes. :mod:`.folder` has the parts, each a
pair, a recipe, a value of the setting that moves L0, and a seed. :mod:`.measure` trains a part and
measures it; :mod:`.matched` reads values at equal L0, with intervals; :mod:`.tables` shows them.
"""
