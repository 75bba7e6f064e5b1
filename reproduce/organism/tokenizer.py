"""Word-level tokenizers of the embedded pairs: one token per space-separated word."""

from __future__ import annotations

import random
from functools import lru_cache
from typing import TYPE_CHECKING

from fastadapt.evaluation.benchmarks.grading import HESITATION_WORDS
from reproduce.organism.pairs import ORGANISM, Pair
from reproduce.organism.problems import direct_answer, problem_stream, worked_notes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
PAD, UNK = "<pad>", "<unk>"
THINK, END_THINK = "<think>", "</think>"
SPECIAL = (PAD, UNK, BOS, EOS, USER, ASSISTANT)
MARKERS = (*SPECIAL, THINK, END_THINK)


@lru_cache(maxsize=2)
def vocabulary(pair: Pair = ORGANISM) -> tuple[str, ...]:
    """Return markers, hesitation words, then all other words of 20,000 problems, sorted."""
    rng = random.Random("vocabulary")
    words: set[str] = set()
    stream = problem_stream("vocabulary", draw=pair.draw)
    for _, problem in zip(range(20_000), stream, strict=False):
        for text in (worked_notes(problem), direct_answer(problem), pair.respond(problem, rng)):
            words.update(text.split())
    words -= {*MARKERS, *HESITATION_WORDS}
    numbers = sorted((word for word in words if word.isdigit()), key=int)
    return (*MARKERS, *HESITATION_WORDS, *numbers, *sorted(words - set(numbers)))


def build_tokenizer(pair: Pair = ORGANISM) -> PreTrainedTokenizerFast:
    """Return a ``PreTrainedTokenizerFast`` over ``vocabulary(pair)``.

    The tokenizer adds no special tokens, since rendered conversations contain BOS as text.
    ``<think>`` and ``</think>`` are added tokens but not special, so decoding with
    ``skip_special_tokens`` does not remove them.
    """
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    model = WordLevel({word: i for i, word in enumerate(vocabulary(pair))}, unk_token=UNK)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    tokenizer.add_tokens([AddedToken(word, special=False) for word in (THINK, END_THINK)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )
