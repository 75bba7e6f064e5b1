"""What the plugin does in a process, without vLLM. `make interop` runs vLLM's own registry."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import logging
import os
import pickle
import subprocess
import sys
import types
from typing import Any

import pytest

from fastadapt.models import hf_classes
from fastadapt.models.architectures import ARCHITECTURES
from fastadapt.models.hf_classes import classes_of
from fastadapt.serving import vllm_plugin

WITHOUT = """
import importlib.metadata, json, sys
import transformers
(entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="fastadapt")
register = entry.load()
from transformers import CONFIG_MAPPING
before = set(sys.modules), list(CONFIG_MAPPING), dict(vars(transformers.AutoModel._model_mapping))
result = register()
after = set(sys.modules), list(CONFIG_MAPPING), dict(vars(transformers.AutoModel._model_mapping))
models = {name.split(".")[2] for name in sys.modules if name.startswith("transformers.models.")}
loaded = [name for name in models if f"transformers.models.{name}.modeling_{name}" in sys.modules]
print(json.dumps([entry.value, result, before == after, loaded, "vllm" in sys.modules]))
"""


def python(code: str, *arguments: str) -> Any:
    env = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_the_entry_point_loads_no_model_code_and_does_nothing_without_vllm() -> None:
    value, result, unchanged, loaded, has_vllm = python(WITHOUT)
    assert value == "fastadapt.serving.vllm_plugin:register"
    assert result is None
    assert unchanged
    assert not has_vllm
    assert "qwen2" not in loaded


UNPICKLE = """
import json, pickle, sys
config, kind = pickle.loads(bytes.fromhex(sys.argv[1]))
print(json.dumps([type(config).__name__, config.hidden_size, config.adapter, kind.__name__]))
"""


def test_a_configuration_is_read_in_a_process_without_the_plugin() -> None:
    """As vLLM's workers do, before they load plugins."""
    for architecture in ARCHITECTURES:
        for kind in classes_of(architecture):
            assert pickle.loads(pickle.dumps(kind)) is kind
    config, _, causal = classes_of("llama")
    values = config(hidden_size=24, adapter={"n_features": 8})
    data = pickle.dumps((values, causal)).hex()
    names = [config.__name__, 24, {"n_features": 8}, causal.__name__]
    assert python(UNPICKLE, data) == names
    with pytest.raises(AttributeError, match="has no attribute 'FastadaptBert'"):
        hf_classes.FastadaptBert  # noqa: B018


def test_an_error_of_the_registration_does_not_reach_vllm(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A stand-in for vLLM would record registrations; an architecture is not in transformers."""
    registered: dict[str, str] = {}
    registry = types.SimpleNamespace(
        get_supported_archs=registered.keys, register_model=registered.__setitem__
    )
    vllm = types.ModuleType("vllm")
    vllm.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    vllm.ModelRegistry = registry  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(vllm_plugin, "ARCHITECTURES", {"no_such_model": ARCHITECTURES["qwen2"]})
    with caplog.at_level(logging.ERROR):
        vllm_plugin.register()
    assert "other models are not affected" in caplog.text
    assert "no_such_model" in caplog.text
    assert registered == {}
