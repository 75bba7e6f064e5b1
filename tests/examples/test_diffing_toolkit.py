"""The method of the diffing toolkit: its class, and the toolkit's data sets as a run's settings."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from run_files import run_settings

from fastadapt.cli.train import parse_train
from fastadapt.data.sources import MixedSource, Source

METHOD = (
    Path(__file__).parents[2] / "examples/diffing_toolkit/configs/diffing/method/fastadapt.yaml"
)


@dataclass(frozen=True)
class DatasetConfig:
    """The attributes of the toolkit's class that are read."""

    name: str
    id: str
    split: str
    is_chat: bool
    text_column: str | None = None
    messages_column: str = "messages"
    subset: str | None = None


CHAT = [DatasetConfig("mix", "org/mix", split, is_chat=True) for split in ("train", "held")]
WEB = DatasetConfig("web", "org/web", "train", is_chat=False, text_column="body", subset="es")


def test_a_run_is_configured_by_the_toolkit(tmp_path: Path) -> None:
    method = yaml.safe_load(METHOD.read_text(encoding="utf-8"))
    written = run_settings("org/tuned", "org/base", [WEB, *CHAT], "out/run", method["settings"])
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(written))
    config, _ = parse_train([str(file)])
    assert (config.pair.target, config.pair.base) == ("org/tuned", "org/base")
    assert config.run.output == "out/run"
    assert config.adapter.n_features == 8192
    assert config.data.bad_rows == "skip"
    web = MixedSource("org/web", 1.0, "train", None, "es", "body")
    chat = MixedSource("org/mix", 1.0, "train", None, None, "messages")
    assert config.data.train == (web, chat)
    validation = config.data.source(config.data.validation, "validation")
    assert validation == Source("org/mix", "held", None, None, "messages")


def test_data_to_validate_on_are_required() -> None:
    for datasets in ([], [WEB]):
        with pytest.raises(ValueError, match=r"validation split, got .*method\.datasets"):
            run_settings("a", "b", datasets, "out", {})


class Method:
    """Base class of the toolkit's methods, as far as it is used."""

    def __init__(self, cfg: Any) -> None:
        self.cfg, self.method_cfg = cfg, cfg.diffing.method


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import ``method.py`` with modules in place of the toolkit's."""
    names: dict[str, dict[str, Any]] = {
        "diffing.methods.diffing_method": {"DiffingMethod": Method},
        "diffing.pipeline": {},
        "diffing.pipeline.diffing_pipeline": {"get_method_class": str.upper},
        "diffing.utils.agents": {"DiffingMethodAgent": SimpleNamespace},
        "diffing.utils.agents.prompts": {"POST_OVERVIEW_PROMPT": ""},
        "diffing.utils.configs": {"get_dataset_configurations": None},
        "omegaconf": {"DictConfig": dict, "OmegaConf": None},
        "streamlit": {"shown": []},
    }
    for name, attributes in names.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    pipeline: Any = sys.modules["diffing.pipeline"]
    pipeline.diffing_pipeline = sys.modules["diffing.pipeline.diffing_pipeline"]
    shown: Any = sys.modules["streamlit"]
    shown.subheader = shown.shown.append
    shown.code = lambda text, language: shown.shown.append(text)
    html = SimpleNamespace(html=lambda text, height, scrolling: shown.shown.append(text))
    shown.components = SimpleNamespace(v1=html)
    monkeypatch.delitem(sys.modules, "method", raising=False)
    yield import_module("method")
    del sys.modules["method"]


def test_the_toolkit_makes_the_method_and_shows_its_pages(method: Any, tmp_path: Path) -> None:
    """``main.py`` gets the class after ``register``; the dashboard calls the two last methods."""
    method.register()
    pipeline: Any = sys.modules["diffing.pipeline.diffing_pipeline"]
    assert pipeline.get_method_class("fastadapt") is method.FastadaptMethod
    assert pipeline.get_method_class("kl") == "KL"
    results = tmp_path / "qwen" / "medical"
    settings = SimpleNamespace(program="fastadapt", overwrite=False)
    instance = method.FastadaptMethod(
        SimpleNamespace(diffing=SimpleNamespace(results_dir=str(results), method=settings))
    )
    assert instance.has_results(tmp_path) == {}
    instance.run_dir.mkdir()
    for name in ("changes.html", "report.html", "changes.json"):
        (instance.run_dir / name).write_text("{}")
    assert instance.has_results(tmp_path) == {"qwen": {"medical": str(results / "fastadapt")}}
    instance.visualize()
    shown: Any = sys.modules["streamlit"]
    assert shown.shown == [
        *("changes.html", "{}", "report.html", "{}"),
        f"fastadapt features serve {instance.run_dir}",
    ]
    assert instance.get_agent().cfg is instance.cfg
    assert yaml.safe_load(METHOD.read_text(encoding="utf-8"))["name"] == method.NAME
    assert "src/diffing/pipeline/diffing_pipeline.py" in method.__doc__
