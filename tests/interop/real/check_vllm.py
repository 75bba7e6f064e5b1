"""Check with vLLM's registry and plugin loader that the plugin affects no other models.

All of vLLM needs a GPU build of torch and a hundred packages. This check therefore executes two of
its files alone, without their imports of other files of vLLM: the registry with its tables of
models, and the loader of plugins.
"""

from __future__ import annotations
import __future__

import ast
import importlib.util
import logging
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch
from checks import check, report
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastadapt.models.architectures import ARCHITECTURES
from fastadapt.models.huggingface.classes import classes_of
from fastadapt.serving.vllm_plugin import BACKEND

AUTOS = (AutoModel, AutoModelForCausalLM)


def folder() -> Path:
    """Return the folder of vLLM's files; finding it does not import vLLM."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def execute(path: Path, **names: Any) -> dict[str, Any]:
    """Execute a file of vLLM without its imports of vLLM; ``names`` replace what it imports."""

    def is_foreign(node: ast.stmt) -> bool:
        if isinstance(node, ast.Import):
            return any(alias.name.startswith("vllm") for alias in node.names)
        return isinstance(node, ast.ImportFrom) and (
            node.level > 0 or (node.module or "").startswith("vllm")
        )

    tree = ast.parse(path.read_text("utf-8"))
    tree.body = [node for node in tree.body if not is_foreign(node)]
    module = types.ModuleType(f"executed_{path.stem}")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    vars(module).update(names)
    annotations = __future__.annotations.compiler_flag
    exec(compile(tree, str(path), "exec", annotations), vars(module))
    return vars(module)


def state() -> dict[str, Any]:
    """Return what a plugin could change for other models."""
    return {
        "environment": dict(os.environ),
        "attention": dict(ALL_ATTENTION_FUNCTIONS.items()),
        "configurations": {name: CONFIG_MAPPING[name] for name in ARCHITECTURES},
        "models": [
            auto._model_mapping[CONFIG_MAPPING[name]] for auto in AUTOS for name in ARCHITECTURES
        ],
        "patches": {name: id(value) for name, value in vars(torch.nn.Module).items()},
        "default dtype": torch.get_default_dtype(),
        "GPU": torch.cuda.is_initialized(),
    }


def main() -> None:
    """Load the plugins as a vLLM process does, and compare before and after."""
    root = folder()
    registry = execute(
        root / "model_executor/models/registry.py",
        init_logger=logging.getLogger,
        logtime=lambda **_: lambda function: function,
    )
    models = registry["ModelRegistry"].models
    vllm: Any = types.ModuleType("vllm")
    vllm.__spec__ = importlib.util.find_spec("vllm")
    vllm.ModelRegistry = registry["ModelRegistry"]
    sys.modules["vllm"] = vllm
    before, entries = state(), dict(models)
    ours = {classes_of(name)[2].__name__ for name in ARCHITECTURES}
    assert len(entries) > 200
    assert not ours & entries.keys()
    check(f"vLLM knows {len(entries)} architectures, and none of the {len(ours)} exported ones")

    plugins = execute(
        root / "plugins/__init__.py", envs=types.SimpleNamespace(VLLM_PLUGINS=["fastadapt"])
    )
    plugins["load_general_plugins"]()
    assert models.keys() - entries.keys() == ours
    assert all(models[name] is entry for name, entry in entries.items())
    check("vLLM's loader finds and calls the plugin; no other entry of the registry changes")

    module, name = BACKEND.split(":")
    for each in ours:
        entry = models[each]
        assert type(entry) is registry["_LazyRegisteredModel"]
        assert (entry.module_name, entry.class_name) == (module, name)
        assert registry["ModelRegistry"]._normalize_arch(each, None) == each
    path = root.joinpath(*module.split(".")[1:]) / "__init__.py"
    tree = ast.parse(path.read_text("utf-8"))
    assert name in [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    assert not [module for module in sys.modules if module.startswith("vllm.")]
    check("each exported name is a lazy entry for a class that vLLM defines, not yet imported")

    assert state() == before
    check("environment, attention, other models' classes, torch.nn.Module and GPU are untouched")

    added = dict(models)
    plugins["plugins_loaded"] = False
    plugins["load_general_plugins"]()
    assert models == added
    assert all(models[each] is entry for each, entry in added.items())
    check("a second call changes nothing")


if __name__ == "__main__":
    main()
    report("vllm", "transformers")
