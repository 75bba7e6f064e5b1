"""The toolkit's data sets become the configuration of a run, which `fastadapt train` reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
