"""Transcoder adapters: a sparse, readable account of what fine-tuning changed in a model.

Beside each frozen *base* MLP, inside the *fine-tuned* model, a wide sparse two-layer network learns
the difference between the two MLPs (arXiv 2602.20904). :class:`TranscoderAdapter` is one such
network and knows no model; :class:`ReplacementModel` wires a set of them into a Hugging Face model.

Importing the package does not import torch: public names are loaded at their first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastadapt.adapter.files import save_adapters
    from fastadapt.adapter.module import AdapterConfig, TranscoderAdapter
    from fastadapt.adapter.sae import SAE, Transcoder
    from fastadapt.errors import RunError, UserError
    from fastadapt.features.loading import LoadedRun, load_run
    from fastadapt.interventions import scale_features
    from fastadapt.models.replacement import (
        ModelPair,
        PairConfig,
        PairMismatchError,
        ReplacementModel,
    )
    from fastadapt.models.trained_files import load_adapters

__version__ = "0.2.0"

__all__ = [
    "SAE",
    "AdapterConfig",
    "LoadedRun",
    "ModelPair",
    "PairConfig",
    "PairMismatchError",
    "ReplacementModel",
    "RunError",
    "Transcoder",
    "TranscoderAdapter",
    "UserError",
    "__version__",
    "load_adapters",
    "load_run",
    "save_adapters",
    "scale_features",
]

_MODULES = {
    "fastadapt.adapter.files": ("save_adapters",),
    "fastadapt.adapter.module": ("AdapterConfig", "TranscoderAdapter"),
    "fastadapt.adapter.sae": ("SAE", "Transcoder"),
    "fastadapt.errors": ("RunError", "UserError"),
    "fastadapt.features.loading": ("LoadedRun", "load_run"),
    "fastadapt.interventions": ("scale_features",),
    "fastadapt.models.replacement": (
        "ModelPair",
        "PairConfig",
        "PairMismatchError",
        "ReplacementModel",
    ),
    "fastadapt.models.trained_files": ("load_adapters",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(module), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
