"""Characters that a byte-level vocabulary splits over several tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from stores import StoreText, make_store
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastadapt.features.autointerp.units import Vocabulary, Window
from fastadapt.features.store.characters import join_characters, show_bytes
from fastadapt.features.store.logit_lens import token_strings

TEXT = "so \u7b54\u6848\u662f \U0001f600 \u2220ABC \ufffd \U0001d465 it"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["so so it it \u7b54\u6848\u7b54\u6848"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_a_token_of_incomplete_characters_shows_its_bytes(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    strings = token_strings(tokenizer, len(tokenizer))
    ids = tokenizer("\u662f")["input_ids"]
    assert len(ids) > 1
    assert "".join(strings[i] for i in ids).replace("\u27e9\u27e8", " ") == "\u27e8E6 98 AF\u27e9"
    assert all(strings)


def test_a_token_of_byte_fallback_shows_its_byte() -> None:
    vocabulary = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256)), ("a", -1.0)]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    strings = token_strings(tokenizer, len(tokenizer))
    assert strings[1 + 0xE6] == "\u27e8E6\u27e9"
    assert strings[1 + 0x41] == "A"


def test_pieces_of_consecutive_tokens_join_to_their_text(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    strings = token_strings(tokenizer, len(tokenizer))
    ids = tokenizer(TEXT)["input_ids"]
    pieces = join_characters([strings[i] for i in ids])
    assert "".join(piece for piece, _ in pieces) == TEXT
    assert sum(n for _, n in pieces) == len(ids)
    for first in range(len(ids)):  # from within a character, its bytes are shown
        cut = "".join(piece for piece, _ in join_characters([strings[i] for i in ids[first:]]))
        whole = show_bytes(b"".join(_bytes(tokenizer, i) for i in ids[first:]))
        assert cut.replace("\u27e9\u27e8", " ") == whole


def _bytes(tokenizer: PreTrainedTokenizerFast, token: int) -> bytes:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    table = {letter: byte for byte, letter in bytes_to_unicode().items()}
    return bytes(table[letter] for letter in tokenizer.convert_ids_to_tokens(token))


def test_a_judge_sees_text_and_a_character_that_is_active_at_any_of_its_tokens(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    strings = token_strings(tokenizer, len(tokenizer))
    ids = tokenizer(TEXT)["input_ids"]
    quiet = np.zeros((1, len(ids), 2), dtype=np.float32)
    store = make_store(tmp_path, [StoreText(ids, [2] * len(ids))], [quiet], strings).store
    words = Vocabulary(store)
    assert "".join(words.pieces(ids)) == TEXT
    bytes_of = [_bytes(tokenizer, i) for i in ids]
    second = next(i for i, raw in enumerate(bytes_of) if raw.startswith(b"\xf0")) + 1
    fires = tuple(i == second for i in range(len(ids)))
    example = words.example(Window(0, 0, tuple(ids), fires))
    active = [p for p, f in zip(example.pieces, example.fires, strict=True) if f]
    assert [piece.strip() for piece in active] == ["\U0001f600"]
