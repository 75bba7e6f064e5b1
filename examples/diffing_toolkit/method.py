"""Run fastadapt as a method of the diffing toolkit (science-of-finetuning/diffing-toolkit).

    python examples/diffing_toolkit/method.py TOOLKIT diffing/method=fastadapt organism=...

TOOLKIT is a clone of the toolkit, in whose environment the script runs; the other arguments are
those of its ``main.py``. ``run`` trains an adapter on the toolkit's pair and data, collects
features and measures what they do; the agent reads the strongest features and may ask for the
details of any.

The toolkit's dashboard is a process of its own, which this script does not start. To see the pages
of a run there, change the clone. Copy ``configs/diffing/method/fastadapt.yaml`` into the same
folder of the clone. In its ``src/diffing/pipeline/diffing_pipeline.py``, let ``get_method_class``
begin with

    if method_name == "fastadapt":
        from method import FastadaptMethod
        return FastadaptMethod

Then start it in the clone: ``PYTHONPATH=.../examples/diffing_toolkit streamlit run dashboard.py``.

fastadapt itself runs in an environment of its own, as the program ``diffing.method.program``: the
two need other versions of the same packages. Written against the toolkit's commit e0b84a5.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from diffing.methods.diffing_method import DiffingMethod
from diffing.pipeline import diffing_pipeline
from diffing.utils.agents import DiffingMethodAgent
from diffing.utils.agents.prompts import POST_OVERVIEW_PROMPT
from diffing.utils.configs import get_dataset_configurations
from omegaconf import DictConfig, OmegaConf
from run_files import overview, run_settings

NAME = "fastadapt"

_OVERVIEW = """- The first user message is an OVERVIEW in JSON. A sparse network beside each MLP of
  the base model learned what fine-tuning changed in it. Each feature reads the MLP's input and adds
  its decoder's direction to the output. Positive activations push towards the fine-tuned model.
  - kl_to_finetuned_nats_per_token: how far the base's MLPs alone, and with the features, are from
    the fine-tuned model. Attention is the fine-tuned model's in both.
  - features: delta_kl is the rise of this KL when the feature is removed; promoted are the tokens
    that the feature makes more likely; example is its strongest activation, at the token in [[ ]].
  - disagreements: tokens at which the two MLPs disagree most, each model's likely next tokens, and
    the features that close the gap.
"""
_TOOLS = """
- get_feature  (free)
  Args: {"feature": "LAYER/NUMBER"}
  Returns: {"density", "delta_kl", "promoted", "suppressed", "examples"} and more of one feature.
"""
_CONDUCT = "- Look at the examples of a feature, not at its promoted tokens alone.\n"
_INTERACTIONS = """
- Features 12/96 and 14/201 fire in lists of doses. I will read more examples of the first.
  CALL(get_feature: {"feature": "12/96"})
"""


class FastadaptAgent(DiffingMethodAgent):
    """Agent that reads a run's features."""

    first_user_message_description = _OVERVIEW
    tool_descriptions = _TOOLS
    additional_conduct = _CONDUCT
    interaction_examples = [_INTERACTIONS]  # noqa: RUF012

    @property
    def name(self) -> str:
        return NAME

    def build_first_user_message(self, method: FastadaptMethod) -> str:
        shown = overview(method.changes(), **self.cfg.diffing.method.overview)
        text = json.dumps(shown, ensure_ascii=False)
        return f"OVERVIEW:\n{text}\n\n{POST_OVERVIEW_PROMPT}"

    def get_method_tools(self, method: FastadaptMethod) -> dict[str, Callable[..., Any]]:
        return {"get_feature": method.feature}


class FastadaptMethod(DiffingMethod):
    """Train, collect and measure with fastadapt, in ``results_dir/fastadapt/run``."""

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        self.results_dir = Path(cfg.diffing.results_dir) / NAME
        self.results_dir.mkdir(parents=True, exist_ok=True)
        self.run_dir = self.results_dir / "run"

    def run(self) -> None:
        """Train and measure; a run that broke off is resumed."""
        measured = self.run_dir / "changes.json"
        overwrite = bool(self.method_cfg.overwrite)
        if measured.exists() and not overwrite:
            self.logger.info(f"{measured} exists; diffing.method.overwrite=true makes it anew")
            return
        settings = self.results_dir / "run.yaml"
        settings.write_text(yaml.safe_dump(self.settings()), encoding="utf-8")
        again = ["--overwrite"] if overwrite else []
        if not (self.run_dir / "summary.json").exists() or overwrite:
            begun = (self.run_dir / "config.yaml").exists() and not overwrite
            self._fastadapt("train", str(settings), *(["--resume"] if begun else again))
        folder = str(self.run_dir)
        self._fastadapt("features", "collect", folder, *self.method_cfg.collect)
        self._fastadapt("changes", folder, *self.method_cfg.changes)

    def settings(self) -> dict[str, Any]:
        """Return the configuration of the run.

        Raises:
            ValueError: the pair or its data are none that fastadapt reads.
        """
        tuned, base = self.finetuned_model_cfg, self.base_model_cfg
        if base.steering_vector is not None:
            raise ValueError("expected a pair of models, got a base with a steering vector")
        if tuned.subfolder and not self._is_lora_adapter:
            raise ValueError(f"{tuned.model_id}: expected a model at its root, got a subfolder")
        target = str(self._lora_adapter_path) if self._is_lora_adapter else tuned.model_id
        chosen = OmegaConf.to_container(self.method_cfg.datasets, resolve=True)
        settings = OmegaConf.to_container(self.method_cfg.settings, resolve=True)
        assert isinstance(chosen, dict)
        assert isinstance(settings, dict)
        datasets = get_dataset_configurations(self.cfg, **chosen)
        return run_settings(target, base.model_id, datasets, str(self.run_dir), settings)

    def _fastadapt(self, *arguments: str, capture: bool = False) -> str:
        """Run fastadapt, whose output goes to the console, or is returned."""
        command = [self.method_cfg.program, *map(str, arguments)]
        self.logger.info(" ".join(command))
        done = subprocess.run(command, check=True, capture_output=capture, text=True)
        return done.stdout if capture else ""

    def changes(self) -> dict[str, Any]:
        """Return the document that ``fastadapt changes`` wrote."""
        text = (self.run_dir / "changes.json").read_text(encoding="utf-8")
        document: dict[str, Any] = json.loads(text)
        return document

    def feature(self, feature: str) -> dict[str, Any]:
        """Return all that the store says about a feature, named LAYER/NUMBER; or the error."""
        try:
            words = ("features", "show", str(self.run_dir), feature, "--json")
            printed = self._fastadapt(*words, capture=True)
        except subprocess.CalledProcessError as error:  # an agent may name any feature
            return {"error": error.stderr.strip()}
        (details,) = json.loads(printed)
        return dict(details)

    def visualize(self) -> None:
        """Show the run's pages in the toolkit's dashboard, if it knows the method (see above)."""
        import streamlit as st

        for name in ("changes.html", "report.html"):
            page = self.run_dir / name
            st.subheader(name)
            st.components.v1.html(page.read_text(encoding="utf-8"), height=900, scrolling=True)
        st.code(f"{self.method_cfg.program} features serve {self.run_dir}", language="bash")

    @staticmethod
    def has_results(results_dir: Path) -> dict[str, dict[str, str]]:
        """Return the folders of finished runs: model to organism to folder."""
        results: dict[str, dict[str, str]] = {}
        for file in sorted(Path(results_dir).glob(f"*/*/{NAME}/run/changes.json")):
            model, organism = file.parts[-5:-3]
            results.setdefault(model, {})[organism] = str(file.parent.parent)
        return results

    def get_agent(self) -> FastadaptAgent:
        return FastadaptAgent(cfg=self.cfg)

    def extra_agent_relevant_cfg(self) -> dict[str, Any]:
        """Return the settings on which an agent's results depend."""
        shown = OmegaConf.to_container(self.method_cfg, resolve=True)
        assert isinstance(shown, dict)
        return {name: shown[name] for name in ("settings", "datasets", "overview")}


def register() -> None:
    """Make the toolkit's ``get_method_class`` know the method."""
    known = diffing_pipeline.get_method_class

    def get_method_class(name: str) -> Any:
        return FastadaptMethod if name == NAME else known(name)

    diffing_pipeline.get_method_class = get_method_class


def main(toolkit: str, *arguments: str) -> None:
    """Run the toolkit's ``main.py`` with the method registered and its configuration known."""
    register()
    program = Path(toolkit) / "main.py"
    configs = Path(__file__).resolve().parent / "configs"
    sys.argv = [str(program), f"hydra.searchpath=[file://{configs}]", *arguments]
    runpy.run_path(str(program), run_name="__main__")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
