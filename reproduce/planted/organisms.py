"""Fine-tune the embedded pair's base, with the planted differences or as the null; train adapters.

Both organisms of a seed are read on the same texts: those with the differences. So the null's
adapters are trained and judged at the planted places too, where its target has learned nothing.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any, Literal

import torch

from fastadapt.cli.train import read_configs
from fastadapt.features.collect import CollectConfig, collect
from fastadapt.features.store.store import Store
from fastadapt.io.atomic import disk_errors, make_folder, replacing, writing_folder
from fastadapt.io.names import has_file
from fastadapt.organism import NAMES
from fastadapt.training import run_dir
from fastadapt.training.config import TrainConfig, from_dict
from fastadapt.training.trainer import train
from reproduce.organism.problems import problem_stream
from reproduce.organism.recipe import CONFIGS, PhaseConfig, base_text, batches, save, train_phase
from reproduce.planted.differences import Planted, Text
from reproduce.planted.judge import CONTEXTS

Role = Literal["planted", "null"]
ROLES: tuple[Role, ...] = ("planted", "null")
_PRESET = "organism"
_RECIPE = CONFIGS["organism"]


@dataclass(frozen=True)
class Size:
    """Sizes of a benchmark.

    Attributes:
        steps, batch_size, lr: of the fine-tuning of an organism.
        adapter_steps, adapter_batch_size, n_features: of its adapters.
        train_texts: texts that adapters are trained on.
        probes: texts that every method reads.
    """

    steps: int = 300
    batch_size: int = 32
    lr: float = 1e-3
    adapter_steps: int = 250
    adapter_batch_size: int = 16
    n_features: int = 512
    train_texts: int = 4000
    probes: int = 600


SIZES = {
    "full": Size(),
    "small": Size(4, 4, 1e-3, 4, 4, n_features=64, train_texts=16, probes=40),
}


class StoppedError(Exception):
    """The command was asked to stop, and what is finished is on the disk."""


@dataclass(frozen=True)
class Maker:
    """Makes what a seed needs, and skips what is on the disk.

    Args:
        folder: folder of the seed.
        seed: the seed.
        size: sizes.
        progress: called with (task, done, total).
        stop: event after which the next step raises :class:`StoppedError`.
    """

    folder: Path
    seed: int
    size: Size
    progress: Callable[[str, int, int], None]
    stop: Event

    @property
    def planted(self) -> Planted:
        """The differences of the seed."""
        return Planted.draw(self.seed)

    def probes(self) -> list[Text]:
        """Return the texts that every method reads."""
        return list(islice(self.planted.texts(f"{self.seed}/probes"), self.size.probes))

    def make(self, role: Role) -> Store:
        """Fine-tune an organism, train its adapters and collect their features, or resume.

        Raises:
            StoppedError: before all is finished.
            RunError: the disk cannot be written.
        """
        make_folder(self.folder)
        self._write_texts()
        target = self.folder / role / "target"
        if not has_file(target / "config.json"):
            self._fine_tune(role, target)
        return self._adapt(role, target)

    def _label(self, role: Role) -> str:
        return f"seed {self.seed}, {role}"

    def _write_texts(self) -> None:
        """Write the texts as token ids."""
        vocabulary = tokenizer().get_vocab()
        folder, planted = self.folder / "texts", self.planted
        if folder.is_dir():
            return
        drawn = islice(planted.texts(f"{self.seed}/train"), self.size.train_texts)
        with disk_errors(folder), replacing(folder) as staged:
            staged.mkdir()
            for name, texts in (("train", drawn), ("validation", self.probes())):
                rows = [{"input_ids": [vocabulary[word] for word in t.words]} for t in texts]
                lines = "".join(json.dumps(row) + "\n" for row in rows)
                (staged / f"{name}.jsonl").write_text(lines, encoding="utf-8")

    def _fine_tune(self, role: Role, out: Path) -> None:
        from transformers import AutoModelForCausalLM

        size, stream = self.size, f"{self.seed}/{role}/fine-tuning"
        pairs: Iterator[tuple[str, str]]
        if role == "planted":
            texts = (" ".join(text.words) for text in self.planted.texts(stream))
            pairs = (("", text) for text in texts)
        else:
            pairs = _own_texts(stream)

        def progress(record: dict[str, Any]) -> None:
            self.progress(f"{self._label(role)}: fine-tuning", record["step"], record["steps"])
            if self.stop.is_set():
                raise StoppedError

        words = tokenizer()
        model: Any = AutoModelForCausalLM.from_pretrained(
            NAMES["organism/base"], trust_remote_code=False, dtype=torch.float32
        )
        train_phase(
            model,
            batches(pairs, words, size.batch_size),
            PhaseConfig(size.steps, size.lr, size.batch_size),
            role,
            progress,
            autocast=False,  # products in bfloat16 are nine times slower where a CPU lacks them
            attention_kind="sdpa",
        )
        with writing_folder(out, last="config.json") as new:
            save(model, words, new)

    def _adapt(self, role: Role, target: Path) -> Store:
        config = adapter_config(target, self.folder, self.size, self.seed)
        run = Path(config.run.output)
        if not has_file(run / run_dir.SUMMARY):

            def progress(record: dict[str, Any]) -> None:
                if record["kind"] == "train":
                    task = f"{self._label(role)}: adapters"
                    self.progress(task, record["step"], self.size.adapter_steps)

            resume = has_file(run / run_dir.CONFIG)
            train(config, resume=resume, sinks=[progress], stop=self.stop)
        store = None
        if not self.stop.is_set():
            settings = CollectConfig(top=CONTEXTS, uniform=0, before=0, after=0)
            store = collect(run, config=settings, stop=self.stop)
        if store is None:
            raise StoppedError
        return store


def adapter_config(target: Path, folder: Path, size: Size, seed: int) -> TrainConfig:
    """Return the preset of the embedded pair, for an organism, its texts and a size."""
    values = read_configs([_PRESET])
    values["pair"]["target"] = str(target.resolve())
    values["adapter"]["n_features"] = size.n_features
    texts = (folder / "texts").resolve()
    values["data"] |= {
        "train": str(texts / "train.jsonl"),
        "validation": str(texts / "validation.jsonl"),
        "family": "text",
    }
    values["optimizer"] |= {
        "batch_size": size.adapter_batch_size,
        "max_steps": size.adapter_steps,
    }
    values["run"] |= {
        "output": str(target.resolve().parent / "run"),
        "seed": seed,
        "eval_every": 0,
        "report": False,
    }
    config: TrainConfig = from_dict(values)
    return config


def _own_texts(stream: str) -> Iterator[tuple[str, str]]:
    """Yield texts of the base's training: answers, and documents with solutions."""
    rng = random.Random(f"{stream}/texts")
    for problem in problem_stream(stream):
        yield base_text(problem, rng, _RECIPE)


def tokenizer() -> Any:
    """Return the tokenizer of the embedded pair, one token per word."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(NAMES["organism/base"], trust_remote_code=False)
