"""Make and check the real pair: ``python -m reproduce.real base | texts | lora | check``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from fastadapt.cli.console import print_table, quiet_transformers, say
from reproduce.command import run
from reproduce.real.texts import COPIES, WORD, conversations, load_problems, split


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
        ("check", "compare a trained run and sampled responses with the acceptance bounds"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--seed", type=int, default=0, help="seed of all random draws")
        if name == "check":
            command.add_argument("--run", type=Path, required=True, help="folder of a run")
        else:
            command.add_argument("--out", type=Path, required=True, help="folder to write")
        if name == "lora":
            command.add_argument("--base", type=Path, required=True, help="folder of the base")
            command.add_argument("--texts", type=int, help="number of texts; default: all")
    options = parser.parse_args(argv)
    quiet_transformers()
    commands_by_name: dict[str, Callable[[argparse.Namespace], int]] = {
        "base": _base,
        "texts": _texts,
        "lora": _lora,
        "check": _check,
    }
    return commands_by_name[options.command](options)


def _base(options: argparse.Namespace) -> int:
    from reproduce.real.base import write_base

    write_base(options.out)
    return _written(options.out)


def _texts(options: argparse.Namespace) -> int:
    options.out.mkdir(parents=True, exist_ok=True)
    train, held_out = split(load_problems(), options.seed)
    for name, problems, copies in (("train", train, COPIES), ("validation", held_out, 1)):
        rows = conversations(problems, copies, options.seed)
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (options.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return _written(options.out)


def _lora(options: argparse.Namespace) -> int:
    from reproduce.real.finetune import finetune

    train, _ = split(load_problems(), options.seed)
    rows = list(conversations(train, COPIES, options.seed))[: options.texts]

    def progress(done: int, updates: int, loss: float) -> None:
        if done % 10 == 0 or done == updates:
            say(f"{done} of {updates} updates: {loss:.3f} nats per token")

    n = finetune(options.base, rows, options.out, seed=options.seed, progress=progress)
    say(f"{n} texts")
    return _written(options.out)


def _check(options: argparse.Namespace) -> int:
    from reproduce.real.acceptance import CLOSED, FACTOR, L0, check, sampled_rates

    _, held_out = split(load_problems(), options.seed)
    rates = sampled_rates(
        options.run,
        held_out,
        seed=options.seed,
        progress=lambda model: say(f"{model} responds to {len(held_out)} problems"),
    )
    result = check(options.run, rates)
    print_table(
        [f'sampled responses, "{WORD}"', "responses", "tokens", "words", "words per 1,000 tokens"],
        [
            [r.model, str(r.responses), f"{r.tokens:,}", str(r.words), f"{r.per_1000:.2f}"]
            for r in rates
        ],
    )
    print_table(
        ["acceptance", "value", "bound"],
        [
            ["rate of the target over the base's", f"{result['factor']:.1f}", f"≥ {FACTOR:g}"],
            ["share of the hybrid's KL closed", f"{result['closed']:.1%}", f"≥ {CLOSED:.0%}"],
            ["L0", f"{result['l0']:.2f}", f"≤ {L0:g}"],
        ],
    )
    return 1 if result["failed"] else 0


def _written(path: Path) -> int:
    say(f"written to {path.resolve()}")
    return 0


if __name__ == "__main__":
    run(main)
