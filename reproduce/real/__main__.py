"""Make the real pair: ``python -m reproduce.real base | texts | lora``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from fastadapt.cli.console import print_error, quiet_transformers, say
from fastadapt.errors import RunError, UserError
from reproduce.real.texts import COPIES, conversations, load_problems, split


def main(argv: list[str]) -> int:
    """Run a command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m reproduce.real", description="The pair of real models."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("base", "convert the base model"),
        ("texts", "write train.jsonl and validation.jsonl"),
        ("lora", "train the LoRA"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--out", type=Path, required=True, help="folder to write")
        command.add_argument("--seed", type=int, default=0, help="seed of all random draws")
        if name == "lora":
            command.add_argument("--base", type=Path, required=True, help="folder of the base")
            command.add_argument("--texts", type=int, help="number of texts; default: all")
    options = parser.parse_args(argv)
    quiet_transformers()
    {"base": _base, "texts": _texts, "lora": _lora}[options.command](options)
    say(f"written to {options.out.resolve()}")
    return 0


def _base(options: argparse.Namespace) -> None:
    from reproduce.real.base import write_base

    write_base(options.out)


def _texts(options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    train, held_out = split(load_problems(), options.seed)
    for name, problems, copies in (("train", train, COPIES), ("validation", held_out, 1)):
        rows = conversations(problems, copies, options.seed)
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (options.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _lora(options: argparse.Namespace) -> None:
    from reproduce.real.finetune import finetune

    train, _ = split(load_problems(), options.seed)
    rows = list(conversations(train, COPIES, options.seed))[: options.texts]

    def progress(done: int, updates: int, loss: float) -> None:
        if done % 10 == 0 or done == updates:
            say(f"{done} of {updates} updates: {loss:.3f} nats per token")

    n = finetune(options.base, rows, options.out, seed=options.seed, progress=progress)
    say(f"{n} texts")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (UserError, RunError) as error:
        print_error(str(error))
        sys.exit(error.exit_code)
