"""Configuration of a run: one frozen dataclass per component, read from and written to YAML.

Constructing a configuration checks all values, before any model is read. Errors name the key as on
the command line (``optimizer.lr``).
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from fastadapt.adapter.module import AdapterConfig
from fastadapt.data.sequences import DataConfig
from fastadapt.errors import UserError, require
from fastadapt.io.documents import read_yaml
from fastadapt.io.names import has_file, typed_path
from fastadapt.models.baselines import Baseline, LoraConfig
from fastadapt.models.replacement import PairConfig
from fastadapt.objective import ObjectiveConfig
from fastadapt.training.optimizer import OptimizerConfig

#: Keys that may change when a run is resumed, since they do not affect the weights.
#: (``data.markers`` and ``data.columns`` do if they change the tokens, whose digest a resumed run
#: compares.)
#: (``run.threads`` does: it changes the order of sums, and so the bits.)
FREE_ON_RESUME = frozenset(
    (
        "run.output",
        "run.log_every",
        "run.eval_every",
        "run.checkpoint_every",
        "run.keep_checkpoints",
        "run.max_bad_batches",
        "run.rank_timeout",
        "run.report",
        "run.sinks",
        "objective.checkpoint",
    )
) | {"data.workers", "pair.offload", "data.markers", "data.columns"}

#: Key of a pair's configuration that is taken from the command line, never from a file.
TRUST = "trust_remote_code"

Trained = Literal["transcoder", Baseline]
SinkName = Literal["tensorboard", "wandb", "trackio"]


@dataclass(frozen=True)
class RunConfig:
    """What a run trains, where it writes, how often, and how many bad batches it accepts.

    Args:
        output: run directory.
        trains: ``transcoder``, an adapter beside every MLP of the base; or a baseline: ``mlp``, the
            base's MLPs themselves; ``norms``, the weights of every RMSNorm; ``bias``, a vector per
            layer that is added to the output of the base's MLP; ``lora``, a low-rank update of each
            matrix of the base's MLPs. A baseline has no features and uses no setting of
            ``adapter``, except that ``adapter.n_features`` chooses the rank of ``lora``.
        rank: rank of the updates of ``lora``, not used otherwise. Null: the rank with as many
            parameters as adapters of ``adapter.n_features`` features.
        init_from: finished run, or folder of its transcoders, whose weights are those before the
            first step; null: new ones. After a later stage of a fine-tuning, features then keep
            their numbers. Both runs have the same base and the same settings of ``adapter``, but
            for ``k`` and ``implementation``.
        seed: seed of new adapters' weights, the order of the data, and the cutoffs.
        log_every: optimiser steps between records of training metrics.
        eval_every: optimiser steps between held-out evaluations, beside those before the first and
            after the last step. 0: only these two.
        checkpoint_every: optimiser steps between checkpoints, beside the one after the last step.
        keep_checkpoints: number of newest checkpoints to keep.
        max_bad_batches: number of consecutive skipped steps, whose loss or gradient was not finite,
            after which the run ends.
        dead_window: number of training tokens after which a feature that has not fired is dead.
        threads: CPU threads of torch (None: torch's choice). Equal bits need equal threads.
        deterministic: on a GPU, use only algorithms whose results do not vary between repeats; the
            backward pass of attention varies by default. A run resumed there has the bits of an
            uninterrupted one only with this setting. It slows attention down.
        sinks: destinations of metrics beside ``metrics.jsonl``: any of ``tensorboard``, ``wandb``,
            ``trackio``, each an extra of the same name.
        report: write ``report.html`` when the run ends; its plots take one to three seconds.
        rank_timeout: with several ranks, seconds that a rank waits for the others before the run
            ends. Writing a checkpoint must take less.

    Raises:
        UserError: an impossible value.
    """

    output: str
    trains: Trained = "transcoder"
    rank: int | None = None
    init_from: str | None = None
    seed: int = 42
    log_every: int = 1
    eval_every: int = 500
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    max_bad_batches: int = 3
    dead_window: int = 1_000_000
    threads: int | None = None
    deterministic: bool = False
    sinks: tuple[SinkName, ...] = ()
    report: bool = True
    rank_timeout: int = 1800

    def __post_init__(self) -> None:
        require(bool(str(self.output).strip()), "run.output", "a folder", self.output)
        choices = _choices(Trained)
        require(self.trains in choices, "run.trains", f"one of {', '.join(choices)}", self.trains)
        require(0 <= self.seed < 2**63, "run.seed", "an integer in [0, 2^63)", self.seed)
        for name, least in (
            ("log_every", 1),
            ("eval_every", 0),
            ("checkpoint_every", 1),
            ("keep_checkpoints", 1),
            ("max_bad_batches", 1),
            ("dead_window", 1),
            ("rank_timeout", 1),
        ):
            value = getattr(self, name)
            require(value >= least, f"run.{name}", f"{least} or more", value)
        require(len(set(self.sinks)) == len(self.sinks), "run.sinks", "each once", self.sinks)
        if self.rank is not None:
            require(self.rank >= 1, "run.rank", "1 or more, or null", self.rank)
            trains = "lora, since only low-rank updates have a rank (run.rank)"
            require(self.trains == "lora", "run.trains", trains, self.trains)
        if self.init_from is not None:
            given, trains = self.init_from, self.trains
            require(bool(given.strip()), "run.init_from", "a run, or null", given)
            fits = "transcoder, since no baseline begins as another run (run.init_from)"
            require(trains == "transcoder", "run.trains", fits, trains)
        if self.threads is not None:
            require(self.threads >= 1, "run.threads", "1 or more, or null", self.threads)


@dataclass(frozen=True)
class TrainConfig:
    """Complete configuration of a training run.

    Raises:
        UserError: values that exclude each other, such as features of a baseline.
    """

    pair: PairConfig
    adapter: AdapterConfig
    objective: ObjectiveConfig
    data: DataConfig
    optimizer: OptimizerConfig
    run: RunConfig

    def __post_init__(self) -> None:
        trains, adapter = self.run.trains, self.adapter
        _check_unused(trains, vars(adapter))
        if trains in ("transcoder", "lora"):
            # config.yaml must record the number: the default may change between versions.
            adapter = dataclasses.replace(adapter, n_features=adapter.features)
            object.__setattr__(self, "adapter", adapter)
        if trains != "transcoder" and self.objective.sparsity:
            raise UserError(
                f"objective.sparsity: expected 0, since run.trains {trains!r} has no features, "
                f"got {self.objective.sparsity}"
            )
        if self.objective.l0 is not None:
            self._check_target(self.objective.l0)
        if self.data.pack is not None:
            size, activation = self.optimizer.batch_size, adapter.activation
            if size == 1:
                raise UserError(
                    "data.pack: expected optimizer.batch_size above 1, since a row holds texts of "
                    f"one batch, got {size}"
                )
            if trains == "transcoder" and activation == "batch_topk":
                raise UserError(
                    "data.pack: expected null with adapter.activation batch_topk, which ranks the "
                    f"codes of a row as those of one text, got {self.data.pack}"
                )

    def _check_target(self, l0: float) -> None:
        trains, adapter = self.run.trains, self.adapter
        if trains != "transcoder":
            raise UserError(
                f"objective.l0: expected null, since run.trains {trains!r} has no features, "
                f"got {l0}"
            )
        if not self.objective.sparsity:
            raise UserError(
                f"objective.l0: expected null with objective.sparsity 0, got {l0}; give the λ to "
                "start from as objective.sparsity, such as 1e-3"
            )
        if adapter.k is not None:
            raise UserError(
                f"objective.l0: expected null with adapter.activation {adapter.activation}, whose "
                f"L0 is adapter.k, {adapter.k:g}, got {l0}; give one of the two"
            )
        if self.run.init_from is not None:
            raise UserError(
                "objective.l0: expected null with run.init_from, since the steering lets L0 start "
                f"at many times its target, as in new adapters, got {l0}; give the last λ of the "
                "other run as objective.sparsity (sparsity_weight in its summary.json, or "
                "objective.sparsity in its config.yaml)"
            )
        if l0 >= adapter.features:
            raise UserError(
                f"objective.l0: expected fewer than the {adapter.features} features of a layer "
                f"(adapter.n_features), got {l0}"
            )

    def located(self) -> TrainConfig:
        """Return the configuration with absolute paths of data and of ``run.init_from``.

        Paths that are not absolute would mean something else in another folder.

        Raises:
            UserError: ``run.init_from`` is the run that this one would replace.
        """
        run, start = self.run, self.run.init_from
        if start is not None:
            path, output = typed_path(start, "run.init_from"), typed_path(run.output, "run.output")
            if output.resolve() in (path.resolve(), path.resolve().parent):
                raise UserError(
                    f"run.init_from: {start} is in run.output, whose run would be replaced; give "
                    "another --run.output"
                )
            run = dataclasses.replace(run, init_from=os.path.abspath(path))
        return dataclasses.replace(self, data=self.data.located(), run=run)

    @property
    def n_features(self) -> int:
        """Features per layer, F; 0 for a baseline."""
        return self.adapter.features if self.run.trains == "transcoder" else 0

    @property
    def trained(self) -> AdapterConfig | LoraConfig | Baseline:
        """The settings of the transcoders or of low-rank updates, or the name of the baseline."""
        if self.run.trains == "lora":
            return LoraConfig(self.run.rank, self.adapter.features)
        return self.adapter if self.run.trains == "transcoder" else self.run.trains


def to_dict(config: Any) -> dict[str, Any]:
    """Return the configuration as nested plain values: dicts, lists, strings, numbers."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def from_dict(values: Mapping[str, Any], kind: type = TrainConfig, prefix: str = "") -> Any:
    """Build a configuration from nested plain values, the inverse of :func:`to_dict`.

    Args:
        values: values by key; missing keys take their defaults.
        kind: dataclass to build.
        prefix: text before a key in error messages, such as ``pair.``.

    Raises:
        UserError: an unknown key (the message names the nearest known one), a missing key, a value
            of the wrong type, or an impossible value.

    Example:
        >>> from_dict({"lr": 1, "betas": [0.9, 0.99]}, OptimizerConfig).betas
        (0.9, 0.99)
    """
    if not isinstance(values, Mapping):
        raise UserError(
            f"{prefix.rstrip('.') or 'configuration'}: expected a mapping, got {values!r}"
        )
    if kind is TrainConfig:
        values = move_old_keys(values)
        run, adapter = values.get("run"), values.get("adapter")
        if isinstance(run, Mapping) and isinstance(adapter, Mapping):
            # Before AdapterConfig checks the values against each other: a baseline uses none.
            _check_unused(run.get("trains", "transcoder"), adapter)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            raise UserError(f"unknown key {prefix}{key}{_nearest(str(key), fields, prefix)}")
    hints = typing.get_type_hints(kind)
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _typed(values[name], hints[name], prefix + name)
        elif dataclasses.is_dataclass(hints[name]):
            arguments[name] = from_dict({}, typing.cast(type, hints[name]), f"{prefix}{name}.")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{prefix}{name} is missing: give it a value")
    return kind(**arguments)


def move_old_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with keys of older files renamed to the present ones.

    ``adapter.kind`` is now ``run.trains``; ``data.train_on_prompt`` is now ``data.loss``. Files
    with the latter date from versions that read markers in a turn's words as tokens.

    Raises:
        UserError: an old key is impossible, or contradicts the one that replaced it.

    Example:
        >>> move_old_keys({"adapter": {"kind": "mlp", "k": None}, "run": {"output": "a"}})
        {'adapter': {'k': None}, 'run': {'trains': 'mlp', 'output': 'a'}}
        >>> move_old_keys({"data": {"train_on_prompt": False}})
        {'data': {'loss': 'assistant', 'markers': 'tokens'}}
    """
    return _move_train_on_prompt(_move_kind(values))


def _move_kind(values: Mapping[str, Any]) -> dict[str, Any]:
    adapter, run = values.get("adapter"), values.get("run") or {}
    if not isinstance(adapter, Mapping) or "kind" not in adapter or not isinstance(run, Mapping):
        return dict(values)
    kind, expected = adapter["kind"], ", ".join(_choices(Trained))
    require(kind in _choices(Trained), "adapter.kind (now run.trains)", f"one of {expected}", kind)
    require(
        run.get("trains", kind) == kind, "adapter.kind", f"run.trains, {run.get('trains')}", kind
    )
    remaining = {key: value for key, value in adapter.items() if key != "kind"}
    return {**values, "adapter": remaining, "run": {"trains": kind, **run}}


def _move_train_on_prompt(values: dict[str, Any]) -> dict[str, Any]:
    data = values.get("data")
    if not isinstance(data, Mapping) or "train_on_prompt" not in data:
        return values
    with_prompt = data["train_on_prompt"]
    if type(with_prompt) is str:  # as typed
        with_prompt = {"true": True, "false": False}.get(with_prompt, with_prompt)
    key = "data.train_on_prompt (now data.loss)"
    require(type(with_prompt) is bool, key, "true or false", with_prompt)
    loss = "all" if with_prompt else "assistant"
    require(
        data.get("loss", loss) == loss,
        key,
        f"agreement with data.loss {data.get('loss')}",
        with_prompt,
    )
    remaining = {key: value for key, value in data.items() if key != "train_on_prompt"}
    return {**values, "data": {**remaining, "loss": loss, "markers": data.get("markers", "tokens")}}


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the whole configuration, defaults included, as YAML."""
    text = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


def load_config(path: Path) -> TrainConfig:
    """Read a configuration from YAML, with ``pair.trust_remote_code`` false (:func:`take_trust`).

    Raises:
        UserError: the file does not exist, is not YAML, or holds values that :func:`from_dict`
            refuses.
    """
    values = read_yaml(path)
    try:
        take_trust(values)
        return typing.cast(TrainConfig, from_dict(values))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def recorded_config(path: Path) -> TrainConfig | None:
    """Read the configuration of a training; None if the folder holds no result of one.

    An intervention records the pair and the data of its run alone.

    Raises:
        UserError: see :func:`load_config`.
    """
    if not has_file(path) or "run" not in read_yaml(path, dict[str, Any]):
        return None
    return load_config(path)


def load_data(path: Path) -> DataConfig:
    """Read the section ``data`` of a configuration, which may be an intervention's.

    Raises:
        UserError: as :func:`load_config`.
    """
    values = read_yaml(path, dict[str, Any])
    try:
        sections = {name: values[name] for name in ("pair", "data") if name in values}
        take_trust(sections)
        config = from_dict({**sections, "run": {"output": str(path.parent)}})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return typing.cast(TrainConfig, config).data


def take_trust(values: Any) -> bool:
    """Remove ``pair.trust_remote_code`` from the values of a file; return whether it was set.

    The file records what its user trusted. Another user may have copied the file, so it must not
    grant trust.

    Example:
        >>> values = {"pair": {"target": "a", "trust_remote_code": True}}
        >>> take_trust(values), values
        (True, {'pair': {'target': 'a'}})

    Raises:
        UserError: the value is neither true nor false.
    """
    pair = values.get("pair") if isinstance(values, dict) else None
    recorded = pair.pop(TRUST, False) if isinstance(pair, dict) else False
    require(type(recorded) is bool, f"pair.{TRUST}", "true or false", recorded)
    return bool(recorded)


def recorded_trust(path: Path) -> bool:
    """Return whether ``config.yaml`` records a run with code that comes with its models."""
    return take_trust(read_yaml(path))


def differences(config: TrainConfig, other: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Return both values of each key that differs but may not change when a run is resumed."""
    ours, theirs = _flat(to_dict(config)), _flat(to_dict(other))
    return {
        key: (ours.get(key), theirs.get(key))
        for key in sorted(ours.keys() | theirs.keys())
        if key not in FREE_ON_RESUME and ours.get(key) != theirs.get(key)
    }


def check_dtype(config: TrainConfig) -> None:
    """Check that a training can run in ``pair.dtype``, at its start: old runs remain readable.

    The gradient of the activation loss is proportional to 1 / (tokens * width * layers). At 1,000
    tokens, width 896, 24 layers and errors of a tenth of the states, 99.9% of its entries round to
    0 in float16.

    Raises:
        UserError: the dtype is float16.
    """
    if config.pair.dtype == "float16":
        raise UserError(
            "pair.dtype: expected bfloat16, float32 or float64 for training, got float16, in which "
            "the gradients of long texts round to 0"
        )


def _check_unused(trains: object, settings: Mapping[str, Any]) -> None:
    """Refuse settings of transcoders in the configuration of a baseline."""
    for field in dataclasses.fields(AdapterConfig) if trains != "transcoder" else ():
        value = settings.get(field.name, field.default)
        chooses_rank = trains == "lora" and field.name == "n_features"
        if value != field.default and not chooses_rank:
            raise UserError(
                f"adapter.{field.name} is a setting of transcoders, not used with "
                f"run.trains={trains!r}: expected {field.default}, got {value!r}; leave it out"
            )


def _choices(hint: Any) -> tuple[str, ...]:
    """Return the values that a ``Literal`` type allows."""
    return typing.get_args(hint)


def _nearest(name: str, known: typing.Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _typed(value: Any, hint: Any, key: str) -> Any:
    """Return ``value`` as the type ``hint``; YAML has ints for floats and lists for tuples."""
    if dataclasses.is_dataclass(hint):
        return from_dict(value, typing.cast(type, hint), f"{key}.")
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in choices:
            return None
        inner = [choice for choice in choices if choice is not type(None)]
        for choice in sorted(inner, key=lambda kind: not _fits(value, kind)):
            return _typed(value, choice, key)
    if origin is typing.Literal:
        require(value in choices, key, f"one of {', '.join(map(str, choices))}", value)
        return value
    if origin is tuple and choices[-1] is Ellipsis and isinstance(value, (list, tuple)):
        return tuple(_typed(item, choices[0], key) for item in value)
    if origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(choices):
        return tuple(_typed(item, choice, key) for item, choice in zip(value, choices, strict=True))
    if origin is dict and isinstance(value, Mapping):
        return dict(value)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{key}: expected a number that a float can hold") from None
    if hint is float and isinstance(value, str) and "e" in value.lower():
        try:
            return float(value)  # YAML 1.1 parses 8e-4, which has no point, as a string
        except ValueError:
            pass
    elif isinstance(hint, type) and type(value) is hint:
        return value
    name = getattr(hint, "__name__", str(hint))
    raise UserError(f"{key}: expected {name}, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value is of a type, type parameters ignored; a YAML list fits a tuple."""
    kind = typing.get_origin(hint) or hint
    return isinstance(value, (list, tuple) if kind is tuple else kind)
