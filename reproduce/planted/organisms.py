"""Fine-tune the embedded pair's base, with the planted differences or as the null; train adapters.

Both organisms of a seed are read on the same texts: those with the differences. So the null's
adapters are trained and judged at the planted places too, where its target has learned nothing.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any, Literal

import torch

from fastadapt.cli.train import read_configs
from fastadapt.io.atomic import disk_errors, replacing, writing_folder
from fastadapt.io.names import has_file
from fastadapt.organism import NAMES
from fastadapt.training import run_dir
from fastadapt.training.config import TrainConfig, from_dict, load_config, save_config, to_dict
from fastadapt.training.trainer import train
from reproduce.organism.problems import problem_stream
from reproduce.organism.recipe import CONFIGS, PhaseConfig, base_text, batches, save, train_phase
from reproduce.organism.tokenizer import ASSISTANT
from reproduce.parts import StoppedError
from reproduce.planted.differences import Planted, Text

Role = Literal["planted", "null"]
ROLES: tuple[Role, ...] = ("planted", "null")
#: Folders of an organism: the fine-tuned model, the texts that adapters read, and their run.
TARGET, TEXTS, RUN = "target", "texts", "run"
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


@dataclass(frozen=True)
class Maker:
    """Makes an organism with its adapters, and skips what is on the disk.

    Args:
        folder: folder of the organism; the caller holds its lock.
        seed: seed of the differences and of all draws.
        role: which organism.
        size: sizes.
        progress: called with (task, done, total).
        stop: event after which the next step raises :class:`StoppedError`.
    """

    folder: Path
    seed: int
    role: Role
    size: Size
    progress: Callable[[str, int, int], None]
    stop: Event

    @property
    def label(self) -> str:
        """The organism in messages."""
        return f"seed {self.seed}, {self.role}"

    def make(self) -> None:
        """Write texts, fine-tune, and train adapters, or resume.

        Raises:
            StoppedError: before all is finished.
            RunError: the disk cannot be written.
        """
        self._write_texts()
        target = self.folder / TARGET
        if not has_file(target / "config.json"):
            self._fine_tune(target)
        self._adapt()

    def _write_texts(self) -> None:
        """Write the texts that adapters are trained and validated on, as token ids."""
        folder = self.folder / TEXTS
        if folder.is_dir():
            return
        vocabulary, planted = tokenizer().get_vocab(), Planted.draw(self.seed)
        drawn = islice(planted.texts(f"{self.seed}/train"), self.size.train_texts)
        held_out = probe_texts(self.seed, self.size)
        with disk_errors(folder), replacing(folder) as staged:
            staged.mkdir()
            for name, texts in (("train", drawn), ("validation", held_out)):
                rows = [{"input_ids": [vocabulary[word] for word in t.words]} for t in texts]
                lines = "".join(json.dumps(row) + "\n" for row in rows)
                (staged / f"{name}.jsonl").write_text(lines, encoding="utf-8")

    def _fine_tune(self, out: Path) -> None:
        from transformers import AutoModelForCausalLM

        size, words = self.size, tokenizer()

        def progress(record: dict[str, Any]) -> None:
            self.progress(f"{self.label}: fine-tuning", record["step"], record["steps"])

        model: Any = AutoModelForCausalLM.from_pretrained(
            NAMES["organism/base"], trust_remote_code=False, dtype=torch.float32
        )
        train_phase(
            model,
            self._watched(batches(fine_tuning_texts(self.seed, self.role), words, size.batch_size)),
            PhaseConfig(size.steps, size.lr, size.batch_size),
            self.role,
            progress,
            autocast=False,  # products in bfloat16 are nine times slower where a CPU lacks them
            attention_kind="sdpa",
        )
        with writing_folder(out, last="config.json") as new:
            save(model, words, new)

    def _watched(self, steps: Iterator[Any]) -> Iterator[Any]:
        """Yield what each step needs, until the command is asked to stop."""
        for step in steps:
            if self.stop.is_set():
                raise StoppedError
            yield step

    def _adapt(self) -> None:
        config = adapter_config(self.folder, self.size, self.seed)
        run = Path(config.run.output)
        if has_file(run / run_dir.SUMMARY):
            return

        def progress(record: dict[str, Any]) -> None:
            if record["kind"] == "train":
                self.progress(f"{self.label}: adapters", record["step"], self.size.adapter_steps)

        resume = has_file(run / run_dir.CONFIG)
        if resume:
            _move(run / run_dir.CONFIG, config)
        train(config, resume=resume, sinks=[progress], stop=self.stop)
        if not has_file(run / run_dir.SUMMARY):
            raise StoppedError


def probe_texts(seed: int, size: Size) -> list[Text]:
    """Return the texts that every method reads."""
    return list(islice(Planted.draw(seed).texts(f"{seed}/probes"), size.probes))


def fine_tuning_texts(seed: int, role: Role) -> Iterator[tuple[str, str]]:
    """Yield texts, each as (prompt, response); the loss of the fine-tuning is on the response.

    Those of the null are drawn as the base's own training texts.
    """
    stream = f"{seed}/{role}/fine-tuning"
    if role == "planted":
        for text in Planted.draw(seed).texts(stream):
            yield " ".join(text.words[: text.start]), " ".join(text.words[text.start :])
    else:
        rng = random.Random(f"{stream}/texts")
        for problem in problem_stream(stream):
            whole = "".join(base_text(problem, rng, _RECIPE))
            mark = ASSISTANT if ASSISTANT in whole else " solution :"
            prompt, _, response = whole.partition(mark)
            yield prompt + mark, response


def _move(path: Path, config: TrainConfig) -> None:
    """Give the stored configuration of a run the paths of its folder, which may have moved."""
    before = load_config(path)
    data = replace(before.data, train=config.data.train, validation=config.data.validation)
    pair = replace(before.pair, target=config.pair.target)
    run = replace(before.run, output=config.run.output)
    moved = replace(before, pair=pair, data=data, run=run)
    if moved != before:
        with disk_errors(path), replacing(path) as staged:
            save_config(moved, staged)


def adapter_config(folder: Path, size: Size, seed: int) -> TrainConfig:
    """Return the preset of the embedded pair, for the organism in a folder."""
    values, folder = read_configs([_PRESET]), folder.resolve()
    values["pair"]["target"] = str(folder / TARGET)
    values["adapter"]["n_features"] = size.n_features
    values["data"] |= {
        "train": str(folder / TEXTS / "train.jsonl"),
        "validation": str(folder / TEXTS / "validation.jsonl"),
        "family": "text",
    }
    values["optimizer"] |= {
        "batch_size": size.adapter_batch_size,
        "max_steps": size.adapter_steps,
    }
    values["run"] |= {
        "output": str(folder / RUN),
        "seed": seed,
        "eval_every": 0,
        "report": False,
    }
    config: TrainConfig = from_dict(values)
    return config


def adapter_settings(size: Size) -> str:
    """Return the SHA-256 of all settings of the adapters but paths, models, texts and the run's."""
    values = to_dict(adapter_config(Path(), size, seed=0))
    del values["run"]
    for section, names in (("pair", ("target", "base")), ("data", ("train", "validation"))):
        for name in names:
            del values[section][name]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def tokenizer() -> Any:
    """Return the tokenizer of the embedded pair, one token per word."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(NAMES["organism/base"], trust_remote_code=False)
