"""What the plugin does in a process, without vLLM. `make interop` runs vLLM's own registry."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import subprocess
import sys
from typing import Any

import pytest

from fastadapt.models.architectures import ARCHITECTURES
from fastadapt.models.huggingface import classes
from fastadapt.models.huggingface.classes import classes_of

WITHOUT = """
import importlib.metadata, json, sys
import transformers
(entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="fastadapt")
register = entry.load()
from transformers import CONFIG_MAPPING
before = set(sys.modules), list(CONFIG_MAPPING), dict(vars(transformers.AutoModel._model_mapping))
result = register()
after = set(sys.modules), list(CONFIG_MAPPING), dict(vars(transformers.AutoModel._model_mapping))
print(json.dumps([entry.value, result, before == after, "vllm" in sys.modules]))
"""


def python(code: str, *arguments: str) -> Any:
    env = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_the_entry_point_is_found_and_does_nothing_without_vllm() -> None:
    value, result, unchanged, has_vllm = python(WITHOUT)
    assert value == "fastadapt.serving.vllm_plugin:register"
    assert result is None
    assert unchanged
    assert not has_vllm


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
        classes.FastadaptBert  # noqa: B018
