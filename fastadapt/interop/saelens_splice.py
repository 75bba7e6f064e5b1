"""Attach coders to models of SAELens, where ``add_sae`` would compute something else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from fastadapt.errors import UserError


def attach(model: Any, coders: Iterable[Any]) -> None:
    """Attach coders that SAELens has loaded to a model, so that they compute what they do here.

    The output of an adapter is added to that of the MLP; the model must be the hybrid, the target
    with the base's MLPs. The output of a transcoder, its skip included, takes the MLP's place.
    Hooks of the coders (``hook_sae_acts_post``) are called, so their features can be read and
    changed. ``model.reset_hooks(including_permanent=True)`` detaches all.

    Args:
        model: ``HookedSAETransformer``, ``SAETransformerBridge`` or ``TransformerBridge``, loaded
            without folding of norms.
        coders: SAEs and transcoders of SAELens, from files that fastadapt wrote.

    Raises:
        UserError: the file of a coder is of another origin, or the model lacks a hook.

    Example::

        sae = SAE.load_from_disk("exported/layer_3")
        attach(model, [sae])
        logits = model(tokens)
    """
    prepared = []
    for coder in coders:
        facts = getattr(coder.cfg.metadata, "fastadapt", None)
        if not isinstance(facts, Mapping):
            raise UserError(
                "expected coders from files that fastadapt wrote, got one without "
                "metadata.fastadapt in its cfg.json; attach it with model.add_sae"
            )
        points = [_point(model, facts[key]) for key in ("reads", "writes")]
        prepared.append((_Splice(coder, additive=facts["additive"]), *points))
    for splice, read_point, write_point in prepared:
        read_point.add_hook(splice.read, is_permanent=True)
        write_point.add_hook(splice.write, is_permanent=True)


def _point(model: Any, names: list[str]) -> Any:
    """Return the hook point of a model that has one of the names."""
    for name in names:
        if name in model.hook_dict:
            return model.hook_dict[name]
    raise UserError(
        f"the model has no hook {' or '.join(names)}; load it as HookedSAETransformer or "
        "SAETransformerBridge"
    )


class _Splice:
    """Two hooks that share the input of one coder."""

    def __init__(self, coder: Any, *, additive: bool) -> None:
        self.coder, self.additive = coder, additive
        self.input: Tensor | None = None

    def read(self, tensor: Tensor, hook: Any) -> Tensor:
        self.input = tensor
        return tensor

    def write(self, tensor: Tensor, hook: Any) -> Tensor:
        assert self.input is not None
        out: Tensor = self.coder(self.input)
        self.input = None
        return tensor + out if self.additive else out
