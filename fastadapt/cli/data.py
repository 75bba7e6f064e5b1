"""`fastadapt data`: select conversations from a data set, and look at a data set."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from fastadapt.cli.console import is_unicode, print_table
from fastadapt.cli.parser import Typed, resume_command
from fastadapt.cli.progress import stoppable
from fastadapt.data.prepare.selection import PrepareConfig
from fastadapt.errors import UserError

if TYPE_CHECKING:
    from fastadapt.data.inspection import Inspection
    from fastadapt.data.sequences import DataConfig
    from fastadapt.data.sources import Source
    from fastadapt.models.sources.pair_sources import Sources


def prepare(
    source: str = PrepareConfig.source,
    *,
    config: PrepareConfig,
    resume: bool = False,
    overwrite: bool = False,
    allow_fewer: bool = False,  # read through the configuration, like the source
    trust_remote_code: bool = False,
    argv: list[str],
) -> int:
    """Select training and validation texts from a data set that training reads: streamed, filtered,
    drawn by domain in a seeded order, with no prompt in both files. Without options, repeat the
    selection of arXiv 2602.20904; --shares none --thinking any --family auto take data without
    domains and without reasoning.

    Args:
        source: file, folder or hub id, as data.train
        resume: resume the unfinished selection in --output
        overwrite: remove the selection in --output first
        allow_fewer: take fewer conversations where a domain cannot fill its quota
    """
    from fastadapt.data.prepare import prepare as select
    from fastadapt.data.prepare.report import summary
    from fastadapt.organism import resolve

    config = dataclasses.replace(config, tokenizer=resolve(config.tokenizer))
    with stoppable() as (stop, progress):
        result = select(
            config,
            resume=resume,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            sink=progress.record,
            stop=stop,
        )
    if result["interrupted"]:
        print(f"Stopped after {result['rows']:,} rows, which are saved.")
        print(f"Resume with: {resume_command(argv, ('data', 'prepare'))}")
        return 0
    for head, rows in summary(result):
        print_table(head, rows)
        print()
    for name in result["files"]:
        print(f"{name}: {(Path(result['output']) / name).resolve()}")
    return 0


@dataclasses.dataclass(frozen=True)
class InspectConfig:
    """How a data set is read.

    Attributes:
        family: as --data.family of train
        columns: column to read, or prompt,response
        loss: all, assistant or thinking
        markers: text or tokens
        max_tokens: leave out longer texts
        split: split of a hub dataset or folder; by default the one that a run reads
        subset: configuration of a hub dataset, or folder in a folder
        revision: branch, tag or commit of a hub dataset
        rows: number of rows to read; by default all that a run would read
        examples: number of examples to print
    """

    family: str | None = None
    columns: str | None = None
    loss: str | None = None
    markers: str | None = None
    max_tokens: int | None = None
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    rows: int | None = None
    examples: int = 3

    def __post_init__(self) -> None:
        from fastadapt.data.families import FAMILIES
        from fastadapt.data.rendered import AUTO, TEXT_ONLY
        from fastadapt.data.tokenised import Loss
        from fastadapt.data.tokens import Markers

        for name, least in (("rows", 1), ("examples", 0), ("max_tokens", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name}: expected {least} or more, got {value}")
        families = (AUTO, TEXT_ONLY, *sorted(FAMILIES))
        choices = (
            ("family", families),
            ("loss", get_args(Loss)),
            ("markers", get_args(Markers)),
        )
        for name, known in choices:
            value = getattr(self, name)
            if value is not None and value not in known:
                raise UserError(f"--{name}: expected one of {', '.join(known)}, got {value!r}")


def inspect(
    source: str,
    *,
    pair: str,
    base: str = "",
    config: Annotated[InspectConfig, Typed(flags=True)],
    trust_remote_code: bool = False,
) -> int:
    """Show how a run would read a data set: what its columns hold, three examples with the tokens
    that the losses on the output count, lengths, and what would be left out and why.

    Args:
        source: file, folder, or hub id, as data.train
        pair: the pair that is to be trained: a preset or YAML file, whose data settings are
            defaults here; or the folder or hub id of the target
        base: base of a target that is a PEFT folder; by default the one that the folder names
    """
    from fastadapt.data.inspection import inspect_source
    from fastadapt.data.sequences import DataConfig
    from fastadapt.models.sources.pair_sources import planned_config
    from fastadapt.training.config import from_dict

    models, data = _models_of(pair, base, trust_remote_code)
    typed = {k: v for k, v in dataclasses.asdict(config).items() if v is not None}
    examples, rows = typed.pop("examples"), typed.pop("rows", None)
    how = {
        key: typed.pop(key) for key in ("split", "revision", "subset", "columns") if key in typed
    }
    values = {"train": source, "validation": "", **data, **typed}
    settings: DataConfig = from_dict(values, DataConfig, "data.")
    architecture = models.configs(planned_config)[0].get_text_config()
    read_as, limit = _read_as(source, settings)
    inspection = inspect_source(
        dataclasses.replace(read_as, **how),
        models.tokenizer(),
        settings,
        max_positions=architecture.max_position_embeddings,
        n_rows=architecture.vocab_size,
        rows=rows,
        limit=limit,
        examples=examples,
    )
    _print_inspection(inspection, settings.loss)
    if inspection.used == limit:
        print(f"No more rows were read: a run uses {limit:,} held-out texts (data.max_validation)")
    return 0


def _read_as(name: str, settings: DataConfig) -> tuple[Source, int | None]:
    """Return a source as a run reads it, and the largest number of texts that the run uses of it.

    A source is read as a part of the mixture, as held-out data, or as training data.
    """
    from fastadapt.organism import resolve

    mixture = () if isinstance(settings.train, str) else settings.train
    part = next((part for part in mixture if part.source == name), None)
    is_held_out = part is None and settings.train != name == settings.validation
    if is_held_out:
        return settings.source(resolve(name), "validation"), settings.max_validation
    return settings.source(resolve(name), "train", part), None


def _models_of(pair: str, base: str, trust: bool) -> tuple[Sources, dict[str, Any]]:
    """Return the models of a pair, and the data settings of a preset or file.

    A whole model without a base stands for both: nothing here reads the base.
    """
    from fastadapt.cli.train import preset_names, read_configs
    from fastadapt.models.pair import PairConfig
    from fastadapt.models.sources import pair_sources
    from fastadapt.models.sources.peft_folder import find_peft
    from fastadapt.organism import resolve
    from fastadapt.training.config import TRUST, from_dict, take_trust

    if pair not in preset_names() and Path(pair).suffix not in (".yaml", ".yml"):
        base = base if find_peft(resolve(pair), None) else pair
        return pair_sources.Sources.find(PairConfig(pair, base, trust_remote_code=trust)), {}
    values = read_configs([pair])
    take_trust(values)
    pair_values, data = values.get("pair"), values.get("data")
    if not isinstance(pair_values, dict) or not isinstance(pair_values.get("target"), str):
        raise UserError(f"--pair {pair}: expected pair.target in this file")
    config: PairConfig = from_dict({**pair_values, TRUST: trust}, PairConfig, "pair.")
    return pair_sources.Sources.find(config), dict(data or {})


def _print_inspection(inspection: Inspection, loss: str) -> None:
    from fastadapt.data.inspection import form_name
    from fastadapt.reporting.visible import visible_lines

    print(f"columns: {inspection.layout}")
    if unread := inspection.layout.unread():
        print(f"not read: {', '.join(unread)}")
    if inspection.layout.kind in ("conversation", "prompt and response"):
        reason = f", since {inspection.no_template}" if inspection.no_template else ""
        print(f"form:    {form_name(inspection.form)}{reason}")
    opening, closing = ("⟦", "⟧") if is_unicode(sys.stdout) else ("[[", "]]")
    print(f"\nTokens between {opening} and {closing} are counted (data.loss {loss}).")
    for example in inspection.examples:
        print(f"\n--- {example.where}: {example.tokens:,} tokens, {example.counted:,} counted")
        shown = ((visible_lines(text), counted) for text, counted in example.pieces)
        pieces = (f"{opening}{t}{closing}" if counted else t for t, counted in shown)
        print("".join(pieces).rstrip("\n"))
    print()
    quantiles = inspection.quantiles()
    if quantiles:
        if inspection.too_long:
            print(
                f"Lengths of {len(inspection.lengths):,} texts, those that are too long included:"
            )
        print_table(
            ["quantile", *(f"{q:g}" for q in quantiles)],
            [["tokens", *(f"{n:,}" for n in quantiles.values())]],
        )
    share = inspection.counted / max(inspection.tokens, 1)
    print(
        f"\n{inspection.used:,} of {inspection.read:,} rows would be used: "
        f"{inspection.tokens:,} tokens, {inspection.counted:,} of them counted ({share:.0%})"
    )
    if inspection.with_markers:
        print(f"{inspection.with_markers:,} have special tokens in what was said, see data.markers")
    if inspection.left_out:
        print()
        rows = [[reason, f"{n:,}"] for reason, n in inspection.left_out.items()]
        print_table(["left out", "rows"], rows)
    for message in inspection.bad:
        print(visible_lines(message))
