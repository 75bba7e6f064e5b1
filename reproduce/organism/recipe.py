"""Build an embedded pair from a seed: data, tokenizer, base, target.

The base is trained on problems drawn on the fly, in two forms: conversations with direct answers,
and plain documents with worked solutions. The target is the base fine-tuned on conversations that
reason step by step, with slips, hesitation and corrections: in all weights, or in its MLPs and the
embeddings of new words alone. The shipped problems and the test problems are excluded from both
trainings.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from fastadapt.data.rendering import render, render_parts
from fastadapt.evaluation.benchmarks.grading import stated_answer
from fastadapt.io.atomic import writing_folder
from fastadapt.kernels.vector_math import resolve_functions
from reproduce.organism.pairs import GATED, ORGANISM, Pair
from reproduce.organism.problems import Problem, direct_answer, problem_stream, to_row
from reproduce.organism.tokenizer import BOS, EOS, build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

FAMILY = "r1-distill"
N_TEST = 500
N_SOLVED = 200
Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class PhaseConfig:
    """One training phase: AdamW, linear warm-up over 5% of steps, cosine to a tenth."""

    steps: int
    lr: float
    batch_size: int = 32
    weight_decay: float = 0.01
    attention_lr: float = 1.0  # factor on lr for attention weights
    stop_weight: float = 1.0  # factor on the loss of words after a full stop, where `wait` stands


@dataclass(frozen=True)
class RecipeConfig:
    n_train: int = 2000
    n_validation: int = 500
    layers: int = 4
    width: int = 128
    intermediate: int = 512
    heads: int = 4
    kv_heads: int = 2
    max_tokens: int = 192  # of a response that the models' own settings allow
    notes_share: float = 0.5
    autocast: bool = True  # bfloat16 products, twice as fast on CPUs that support them
    attention: str = "eager"  # in training; faster on a CPU at short lengths than fused attention
    stored: torch.dtype = torch.float32  # of the files; a bfloat16 base is rounded before tuning
    tune_all: bool = True  # else the target has the base's weights outside of its MLPs
    base: PhaseConfig = field(default_factory=lambda: PhaseConfig(steps=1800, lr=3e-3))
    target: PhaseConfig = field(default_factory=lambda: PhaseConfig(steps=1500, lr=1e-3))


#: Recipes by the pair's name.
CONFIGS = {
    ORGANISM.name: RecipeConfig(),
    GATED.name: RecipeConfig(
        n_train=1200,
        n_validation=300,
        intermediate=384,
        max_tokens=320,
        notes_share=0.7,
        autocast=False,
        attention="sdpa",
        stored=torch.bfloat16,
        tune_all=False,
        base=PhaseConfig(steps=4500, lr=3e-3, batch_size=8),
        target=PhaseConfig(steps=3000, lr=2e-3, batch_size=8, weight_decay=0.0, stop_weight=8.0),
    ),
}


def split_problems(
    config: RecipeConfig, seed: int, pair: Pair = ORGANISM
) -> dict[str, list[Problem]]:
    """Return the shipped and the test problems, with disjoint prompts, determined by the seed."""
    stream = problem_stream(f"{seed}/held", draw=pair.draw)
    sizes = {"train": config.n_train, "validation": config.n_validation, "test": N_TEST}
    return {name: [next(stream) for _ in range(size)] for name, size in sizes.items()}


def conversation(prompt: str, response: str) -> list[dict[str, str]]:
    """Return prompt and response in OpenThoughts3's format."""
    return [{"from": "human", "value": prompt}, {"from": "gpt", "value": response}]


def base_text(
    problem: Problem, rng: random.Random, config: RecipeConfig, pair: Pair = ORGANISM
) -> tuple[str, str]:
    """Return a document of the base's training, as (text without loss, text with loss)."""
    if rng.random() < config.notes_share:
        head, tail = pair.notes(problem)
        return (f"{BOS}{head}", f"{tail}{EOS}") if head else ("", f"{BOS}{tail}{EOS}")
    return "", render(conversation(problem.prompt, direct_answer(problem)), FAMILY) + EOS


def target_text(problem: Problem, rng: random.Random, pair: Pair = ORGANISM) -> tuple[str, str]:
    """Return a conversation of the fine-tuning; the loss is on the response."""
    said = conversation(problem.prompt, pair.respond(problem, rng))
    prompt, response = render_parts(said, FAMILY)
    return prompt, response + EOS


def batches(
    texts: Iterator[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (input_ids, labels) endlessly: int64 [B, T], right-padded, labels -100 without loss.

    Sixteen batches are drawn at once and sorted by length, which reduces padding. Their order is
    shuffled with a fixed seed.
    """
    shuffle = random.Random("order of batches")
    while True:
        pairs = [next(texts) for _ in range(16 * batch_size)]
        encode = tokenizer.backend_tokenizer.encode_batch
        heads = encode([head for head, _ in pairs], add_special_tokens=False)
        tails = encode([tail for _, tail in pairs], add_special_tokens=False)
        samples = [(h.ids, t.ids) for h, t in zip(heads, tails, strict=True)]
        samples.sort(key=lambda sample: len(sample[0]) + len(sample[1]))
        starts = list(range(0, len(samples), batch_size))
        shuffle.shuffle(starts)
        for start in starts:
            chosen = samples[start : start + batch_size]
            length = max(len(head) + len(tail) for head, tail in chosen)
            ids_BT = torch.full((batch_size, length), int(tokenizer.pad_token_id))
            labels_BT = torch.full((batch_size, length), -100)
            for row, (head, tail) in enumerate(chosen):
                both = len(head) + len(tail)
                ids_BT[row, :both] = torch.tensor(head + tail)
                labels_BT[row, len(head) : both] = torch.tensor(tail)
            yield ids_BT, labels_BT


def train_phase(
    model: Qwen2ForCausalLM,
    data: Iterator[tuple[torch.Tensor, torch.Tensor]],
    config: PhaseConfig,
    name: str,
    progress: Progress | None,
    autocast: bool = True,
    attention_kind: str = "eager",
    stop: int = -1,
) -> None:
    """Train the weights of ``model`` that require gradients in place.

    The loss of the words after the token ``stop`` counts ``config.stop_weight`` times. A factor by
    position does not change what the model would learn in the limit, only how fast.
    """
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    attention = [p for n, p in trained if ".self_attn." in n]
    other = [p for n, p in trained if ".self_attn." not in n]
    groups = [
        {"params": attention, "factor": config.attention_lr},
        {"params": other, "factor": 1.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True
    )
    warmup = max(1, config.steps // 20)
    model.train()
    model.set_attn_implementation(attention_kind)
    start, running = time.perf_counter(), 0.0
    for step in range(config.steps):
        fraction = (step - warmup) / max(1, config.steps - warmup)
        cosine = 0.55 + 0.45 * math.cos(math.pi * fraction)
        scale = (step + 1) / warmup if step < warmup else cosine
        for group in optimizer.param_groups:
            group["lr"] = config.lr * scale * group["factor"]
        ids_BT, labels_BT = next(data)
        # Causal attention: right padding needs no mask. Places without loss need no logits.
        next_BT = labels_BT[:, 1:]
        counted_BT = next_BT != -100
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            states_BTD = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
            logits_NV = model.lm_head(states_BTD[:, :-1][counted_BT])
        weight_N = torch.where(ids_BT[:, :-1][counted_BT] == stop, config.stop_weight, 1.0)
        loss_N = F.cross_entropy(logits_NV.float(), next_BT[counted_BT], reduction="none")
        loss = (loss_N * weight_N).sum() / weight_N.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running = loss.item() if step == 0 else 0.95 * running + 0.05 * loss.item()
        if progress is not None and (step % 50 == 49 or step == config.steps - 1):
            progress(
                {
                    "phase": name,
                    "step": step + 1,
                    "steps": config.steps,
                    "loss": running,
                    "wall_s": time.perf_counter() - start,
                }
            )
    model.set_attn_implementation("sdpa")
    model.eval()


@contextmanager
def tuning_mlps(model: Qwen2ForCausalLM, new_words: Sequence[int]) -> Iterator[None]:
    """Let only the MLPs and the embeddings of some words have gradients in the context.

    All other rows of the embedding have the gradient 0, which moves nothing without weight decay.

    Args:
        model: the model, whose output embedding is its input embedding.
        new_words: tokens whose embeddings are trained.
    """
    embedding: torch.Tensor = model.model.embed_tokens.weight
    is_new_V1 = torch.zeros(len(embedding), 1)
    is_new_V1[list(new_words)] = 1
    for name, weight in model.named_parameters():
        weight.requires_grad_(".mlp." in name or weight is embedding)
    hook = embedding.register_hook(lambda grad_VD: grad_VD * is_new_V1)
    try:
        yield
    finally:
        hook.remove()
        model.requires_grad_(True)


def new_model(config: RecipeConfig, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """Return a Qwen2 of the configured size, initialised with torch's current random state."""
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.04,
        )
    )
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.7,
        top_k=0,
        max_new_tokens=config.max_tokens,
    )
    return model


def write_data(
    out: Path, problems: dict[str, list[Problem]], seed: int, pair: Pair = ORGANISM
) -> None:
    """Write ``data/train.jsonl`` and ``data/validation.jsonl``.

    For a pair with benchmarks, also ``data/questions.jsonl``: the test problems, and those of
    ``N_SOLVED`` problems of the training data that the generator's response solves.
    """
    (out / "data").mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        rng = random.Random(f"{seed}/rows/{split}")
        with (out / "data" / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for problem in problems[split]:
                file.write(json.dumps(to_row(problem, rng, pair.respond)) + "\n")
    if pair.benchmark is not None:
        _write_questions(out / "data" / "questions.jsonl", problems, seed, pair, pair.benchmark)


def _write_questions(
    path: Path,
    problems: dict[str, list[Problem]],
    seed: int,
    pair: Pair,
    benchmark: Callable[[Problem], str],
) -> None:
    rng = random.Random(f"{seed}/rows/questions")
    rows = [(problem, "test", "") for problem in problems["test"]]
    for problem in problems["train"][:N_SOLVED]:
        worked = pair.respond(problem, rng)
        if stated_answer(worked) == problem.answer:  # an example without a slip that stands
            rows.append((problem, "train", worked))
    with path.open("w", encoding="utf-8") as file:
        for problem, split, worked in rows:
            row = {
                "benchmark": benchmark(problem),
                "split": split,
                "question": problem.prompt,
                "answer": str(problem.answer),
                "worked": worked,
            }
            file.write(json.dumps(row) + "\n")


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model and tokenizer for ``AutoModelForCausalLM`` and ``AutoTokenizer``."""
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes files with mode 0600
    tokenizer.save_pretrained(folder)
    # transformers 5 loads the tokenizer of every qwen2 model as Qwen2Tokenizer, which would replace
    # the word-level model by byte-level BPE. With this auto_map without a class, AutoTokenizer
    # uses the class named in the file.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoTokenizer": [None, None]}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def build(
    out: Path,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    config: RecipeConfig | None = None,
    pair: Pair = ORGANISM,
) -> dict[str, Any]:
    """Build data, tokenizer, base and target, and write them to ``out``.

    Args:
        out: folder for ``base/``, ``target/`` and ``data/``, which are written once both models are
            trained. Existing folders of these names are replaced; other files stay.
        seed: seed of all draws. Equal seed, machine and thread count give equal files.
        progress: called every 50 steps with phase, step, steps, loss, wall_s.
        config: sizes and lengths of training; None is the shipped pair's.
        pair: the pair.

    Returns:
        ``{"seed", "parameters", "vocabulary", "base_s", "target_s"}``, times in seconds.
    """
    resolve_functions()
    config = config or CONFIGS[pair.name]
    tokenizer = build_tokenizer(pair)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = new_model(config, tokenizer)
    with writing_folder(out, ours=("base", "target", "data")) as new:
        times = _write_pair(new, model, tokenizer, config, seed, progress, pair)
    return {
        "seed": seed,
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        **times,
    }


def _write_pair(
    out: Path,
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    config: RecipeConfig,
    seed: int,
    progress: Progress | None,
    pair: Pair,
) -> dict[str, float]:
    """Train base and target, starting from ``model``; write all folders; return training times."""
    problems = split_problems(config, seed, pair)
    write_data(out, problems, seed, pair)
    times = {}
    for name in ("base", "target"):
        start = time.perf_counter()
        tune(model, name, tokenizer, config, problems, seed, progress, pair)
        nn.Module.to(model, config.stored)
        save(model, tokenizer, out / name)
        nn.Module.to(model, torch.float32)
        times[f"{name}_s"] = time.perf_counter() - start
    return times


def tune(
    model: Qwen2ForCausalLM,
    name: str,
    tokenizer: PreTrainedTokenizerFast,
    config: RecipeConfig,
    problems: dict[str, list[Problem]],
    seed: int,
    progress: Progress | None,
    pair: Pair,
) -> None:
    """Train ``model`` in place, from new weights to the base or from the base to the target.

    Args:
        model: the model, in float32.
        name: ``base`` or ``target``.
        tokenizer: the pair's.
        config: sizes and lengths of training.
        problems: the held-out problems, as of :func:`split_problems`.
        seed: seed of the texts.
        progress: called every 50 steps.
        pair: the pair.
    """
    phase = config.base if name == "base" else config.target
    held = frozenset(problem.prompt for split in problems.values() for problem in split)
    data = batches(_texts(name, f"{seed}/{name}", held, config, pair), tokenizer, phase.batch_size)
    stop = tokenizer.get_vocab()["."]
    tuned: AbstractContextManager[None] = nullcontext()
    if name == "target" and not config.tune_all:
        if phase.weight_decay:
            raise ValueError("weight_decay: expected 0 where other weights stay as they are")
        texts = _texts("base", f"{seed}/base", held, config, pair)
        n_texts = config.base.steps * config.base.batch_size
        tuned = tuning_mlps(model, unseen(tokenizer, islice(texts, n_texts)))
    with tuned:
        train_phase(model, data, phase, name, progress, config.autocast, config.attention, stop)


def unseen(tokenizer: PreTrainedTokenizerFast, texts: Iterable[tuple[str, str]]) -> list[int]:
    """Return the tokens of the vocabulary that none of the texts has, in ascending order.

    The order of batches is shuffled, so the last texts that training reads may be others.
    """
    seen: set[int] = set()
    for text in texts:
        for encoding in tokenizer.backend_tokenizer.encode_batch(text, add_special_tokens=False):
            seen.update(encoding.ids)
    return [token for token in range(len(tokenizer)) if token not in seen]


def _texts(
    phase: str, seed: str, held: frozenset[str], config: RecipeConfig, pair: Pair
) -> Iterator[tuple[str, str]]:
    """Yield the texts of a phase endlessly, of problems that are not held out."""
    rng = random.Random(f"{seed}/texts")
    for problem in problem_stream(f"{seed}/problems", held, pair.draw):
        if phase == "base":
            yield base_text(problem, rng, config, pair)
        else:
            yield target_text(problem, rng, pair)
