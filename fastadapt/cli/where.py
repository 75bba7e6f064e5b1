"""`fastadapt where`: measure in which parts of the models a pair differs, before any training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastadapt.cli.console import print_table, quiet_transformers
from fastadapt.cli.parser import HELP_FLAGS, Parser, add_components
from fastadapt.cli.progress import resume_hint, stoppable
from fastadapt.cli.train import components_of, find_config, preset_names, read_configs, write_typed
from fastadapt.errors import UserError
from fastadapt.io.names import has_file, typed_path

if TYPE_CHECKING:
    from fastadapt.evaluation.difference.locate import WhereRequest

FLAGS = {
    "--generate": "let every hybrid answer questions: accuracy and length of the answers",
    "--overwrite": "remove the contents of --output first, once the settings are checked",
}
#: Fields without an option: those that only training uses, or that the command sets itself.
SKIPPED = {
    "pair": {"offload", "fused_blocks"},
    "data": {"train", "loss", "train_split", "bucket", "pad_to", "pack", "workers"},
    "benchmarks": {"sampling", "family"},
}


def where_parser() -> Parser:
    """Build the parser of `fastadapt where`."""
    from fastadapt.data.sequences import DataConfig
    from fastadapt.evaluation.difference.locate import WhereConfig
    from fastadapt.models.pair import PairConfig

    parser = Parser(
        prog="fastadapt where",
        usage="fastadapt where [PAIR_OR_YAML] [--data SOURCE] [--text TEXT_OR_FILE] "
        "[--output FOLDER] [--OPTION VALUE ...]",
        description="Measure in which parts of the models a pair differs: the KL to the target "
        "with every combination of attention, MLPs, norms, and embeddings with the head taken from "
        "the base; the share of each part; single layers; the change of the weights. No training "
        "is needed. The same command, without --overwrite, resumes an unfinished measurement. "
        "--data SOURCE is short for --data.validation SOURCE.",
    )
    parser.add_argument(
        "source",
        metavar="PAIR_OR_YAML",
        nargs="?",
        help=f"a preset ({', '.join(preset_names())}), a YAML file, or the folder of a run; its "
        "components pair and data are read; without it, --pair.target and --pair.base name the "
        "models",
    )
    parser.add_argument(
        "--text", type=str, help="a text, or a file that holds one: measure it token by token"
    )
    parser.add_argument(
        "--output",
        type=str,
        help="folder to write; by default where in the folder of the run, or runs/NAME-where; with "
        "--text, -text is appended",
    )
    for flag, text in FLAGS.items():
        parser.add_argument(flag, action="store_true", default=False, help=text)
    parser.add_class_arguments(PairConfig, "pair", skip=SKIPPED["pair"])
    parser.add_class_arguments(DataConfig, "data", skip=SKIPPED["data"])
    add_components(parser, WhereConfig, SKIPPED)
    return parser


def where(argv: list[str]) -> int:
    """Run `fastadapt where`: measure where a pair differs, as presets, files and options say."""
    if HELP_FLAGS & set(argv):
        where_parser().print_help()
        return 0
    request, folder, overwrite = parse_where(argv)
    from fastadapt.evaluation.difference.locate import CONTENTS, RESULT, locate
    from fastadapt.evaluation.difference.report import difference_tables
    from fastadapt.evaluation.folder import opened

    quiet_transformers()
    with (
        opened(folder, contents=CONTENTS) as out,
        stoppable() as (stop, progress),
    ):
        result = locate(request, out, progress, stop, overwrite=overwrite)
    if result is None:
        print(f"Stopped; finished measurements are saved in {folder}.")
        print(resume_hint(overwrite=overwrite))
        return 0
    for table in difference_tables(result):
        print(table.title)
        print_table(table.head, table.rows)
        print()
    for note in result["notes"]:
        print(f"Note: {note}.")
    print(result["verdict"])
    for name in (RESULT, "tables.md", "tables.tex", "plots", "report.html"):
        print(f"{name}: {(folder / name).resolve()}")
    return 0


def parse_where(argv: Sequence[str]) -> tuple[WhereRequest, Path, bool]:
    """Return the request, the output folder and whether it is overwritten, from the arguments.

    Raises:
        UserError: an unknown option, preset or key, an impossible value, or no pair or texts.
    """
    from fastadapt.data.sequences import DataConfig
    from fastadapt.evaluation.difference.locate import WhereConfig, WhereRequest
    from fastadapt.models.pair import PairConfig
    from fastadapt.training.config import from_dict

    argv = [_source_of_data(word) for word in argv]
    parser = where_parser()
    typed = parser.parse_args(argv, defaults=False, _skip_validation=True)
    components, name = components_of(typed), typed.get("source")
    values = {} if name is None else _read_values(name)
    write_typed(values, components, argv, [] if name is None else [name])
    pair, data = values.get("pair"), values.get("data") or {}
    if not pair:
        parser.error(f"PAIR_OR_YAML is missing; presets: {', '.join(preset_names())}")
    has_texts = data.get("validation") is not None
    settings = {key: components[key] for key in WhereConfig.__annotations__ if key in components}
    request = WhereRequest(
        from_dict(pair, PairConfig, "pair."),
        from_dict({"train": "", **data}, DataConfig, "data.") if has_texts else None,
        typed.get("text"),
        bool(typed.get("generate")),
        from_dict(settings, WhereConfig),
    )
    output = typed.get("output")
    folder = typed_path(output, "--output") if output else _default_output(name, request)
    return request, folder, bool(typed.get("overwrite"))


def _source_of_data(word: str) -> str:
    """Return ``--data`` as ``--data.validation``: the command reads no other data."""
    option, equals, value = word.partition("=")
    return f"--data.validation{equals}{value}" if option == "--data" else word


def _read_values(name: str) -> dict[str, Any]:
    """Return the components ``pair`` and ``data`` of a preset, a YAML file, a run or adapters."""
    from fastadapt.training.config import move_old_keys

    folder = _folder(name)
    values = move_old_keys(read_configs([name]) if folder is None else _run_values(folder))
    return {key: values[key] for key in ("pair", "data") if key in values}


def _folder(name: str) -> Path | None:
    """Return the folder of a run or of adapters; None for presets and files."""
    folder = typed_path(name, "PAIR_OR_YAML")
    if not folder.is_dir():
        return None
    in_run = folder.name == "adapter" and has_file(folder.parent / "config.yaml")
    return folder.parent if in_run else folder


def _run_values(folder: Path) -> dict[str, Any]:
    """Return the components of a run or of a folder of adapters, at the commits that they name."""
    from fastadapt.adapter.files import CARD, adapters_of
    from fastadapt.evaluation.runs import read_pair
    from fastadapt.io.documents import read_yaml
    from fastadapt.models.trained_files import read_adapters
    from fastadapt.training.config import TRUST, to_dict

    values: dict[str, Any] = {}
    if has_file(folder / "config.yaml"):
        values = read_yaml(folder / "config.yaml", dict[str, Any])
    finished = any(has_file(place / CARD) for place in (folder, folder / "adapter"))
    if not values and not finished:
        raise UserError(
            f"{folder} is a folder without config.yaml and {CARD}; expected a preset "
            f"({', '.join(preset_names())}), a YAML file or the folder of a run"
        )
    if finished:
        adapters = adapters_of(folder)
        metadata = read_adapters(adapters)[1]["metadata"]
        recorded = (values.get("pair") or {}).get(TRUST, False)
        values["pair"] = {**to_dict(read_pair(adapters, metadata)), TRUST: recorded}
        values.setdefault("data", {"family": metadata["family"]} if "family" in metadata else {})
    return values


def _default_output(name: str | None, request: WhereRequest) -> Path:
    suffix = "where" if request.text is None else "where-text"
    if name is not None and (folder := _folder(name)) is not None:
        return folder / suffix
    stem = Path(request.pair.target).name if name is None else find_config(name).stem
    return Path("runs") / f"{stem}-{suffix}"
