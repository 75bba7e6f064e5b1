"""Places are those at which transformers' own forward predicts the word."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from organism_runs import make_run

from fastadapt.errors import UserError
from fastadapt.evaluation.generation.responses import Response
from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.graphs.explain import token_ids
from fastadapt.graphs.places import PlaceConfig, find_places, word_tokens

TEXT = (
    "<｜User｜>tom has 3 apples and gets 4 apples . how many now ?<｜Assistant｜><think> 3 + 4 "
    "= 8 . wait , 3 + 4 = 7 . so the answer is 7 . </think> the answer is 7"
)
N_PROMPT = 14


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    run = make_run(tmp_path_factory.mktemp("places") / "run")
    return ModelSet.open([run], device="cpu").model


@pytest.fixture(scope="module")
def response(model: Any) -> Response:
    ids = token_ids(model, TEXT).tolist()
    return Response("a", 2, 0, ids[:N_PROMPT], ids[N_PROMPT:], "", "eos", None)


@pytest.mark.parametrize("stream", ["replacement", "target"])
def test_places_are_those_of_the_model(model: Any, response: Response, stream: Any) -> None:
    ids = torch.tensor([*response.prompt_tokens, *response.tokens])
    with model.mode(stream), torch.no_grad():
        shares = model(ids[None]).logits[0].float().softmax(-1)
    words = (".", "the", "Wait")
    wanted = word_tokens(model.pair.tokenizer, shares.shape[-1], words)
    names = {model.pair.tokenizer.decode([i]).strip().lower() for i in wanted.tolist()}
    assert names == {".", "the", "wait"}

    tops = torch.isin(shares.argmax(-1), wanted)
    expected = [i for i in range(N_PROMPT - 1, len(ids)) if tops[i]]
    assert 0 < len(expected) < len(response.tokens)  # the control: not every position
    places = find_places(model, [response], PlaceConfig(words), stream=stream)
    assert [place.position for place in places] == expected
    for place in places:
        assert (place.id, place.repetition, place.is_top) == ("a", 2, True)
        assert place.ids == tuple(ids[: place.position + 1].tolist())
        assert place.probability == pytest.approx(
            float(shares[place.position, wanted].sum()), rel=1e-4
        )
        assert place.token in wanted.tolist()

    share = shares[:, wanted].sum(-1)
    level = float(share[N_PROMPT:].median())
    risen = [
        i
        for i in range(N_PROMPT - 1, len(ids))
        if share[i] >= level and (i == N_PROMPT - 1 or share[i - 1] < level)
    ]
    places = find_places(model, [response], PlaceConfig(words, above=level), stream=stream)
    assert [place.position for place in places] == risen


def test_only_after_a_text(model: Any, response: Response) -> None:
    places = find_places(model, [response], PlaceConfig((".", "the"), above=1e-9))
    assert [place.position for place in places] == [N_PROMPT - 1]  # above it from the start
    later = find_places(model, [response], PlaceConfig((".",), after="the answer is"))
    everywhere = find_places(model, [response], PlaceConfig((".",)))
    assert {place.position for place in later} < {place.position for place in everywhere}
    assert find_places(model, [response], PlaceConfig((".",), after="nowhere")) == []


def test_impossible_words(model: Any, response: Response) -> None:
    with pytest.raises(UserError, match=r"tokens of the vocabulary, got \['xyzzy'\]"):
        find_places(model, [response], PlaceConfig((".", "xyzzy")))
    with pytest.raises(UserError, match=r"--at: expected one or more words, none blank"):
        PlaceConfig((" ",))
    with pytest.raises(UserError, match="--above: expected more than 0 and at most 1, got 0"):
        PlaceConfig((".",), above=0)
