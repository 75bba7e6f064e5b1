"""Commands about what features do: show them, and change them."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated

from fastadapt.cli.console import print_table, say
from fastadapt.cli.parser import Typed
from fastadapt.cli.progress import stoppable
from fastadapt.data.rendered import Prefill
from fastadapt.effects.ablation import EffectsConfig
from fastadapt.effects.changes import ChangesConfig
from fastadapt.effects.texts import (
    UNIT_HEAD,
    responses_text,
    trace_tables,
    unit_lines,
    unit_row,
)
from fastadapt.errors import UserError
from fastadapt.features.store.schema import Kind
from fastadapt.features.store.store import Store
from fastadapt.io.names import typed_path
from fastadapt.reporting.formatting import number
from fastadapt.reporting.visible import visible_lines

if TYPE_CHECKING:
    from fastadapt.effects.run import LoadedRun
    from fastadapt.features.store.details import UnitDetails


def show(
    run: str,
    features: list[str] = [],  # noqa: B006
    *,
    kind: Kind = "adapter",
    examples: int = 5,
    top: int = 20,
    json: bool = False,
) -> int:
    """Show features: how often they fire, what they promote, their effect and strongest examples.
    Without names, list the strongest features.

    Args:
        run: a run with collected features, or a store
        features: features, each as LAYER/NUMBER, such as 2/17
        kind: kind of unit: adapter for features, base or target for collected neurons of an MLP
        examples: number of examples of each feature
        top: number of features in the list
        json: print JSON
    """
    from fastadapt.features.store.details import read_details
    from fastadapt.features.store.ranking import strongest
    from fastadapt.features.store.sets import pair_of

    for name, value in (("--examples", examples), ("--top", top)):
        if value < 0:
            raise UserError(f"{name}: expected 0 or more, got {value}")
    store = Store.open(run)
    pairs = [pair_of(name) for name in features]
    pairs = pairs or [unit[:2] for unit in strongest(store, kind, top)]
    examples = examples if features else 0
    units = read_details(store, pairs, kind=kind, examples=examples)
    if json:
        print(json_module.dumps([asdict(unit) for unit in units], indent=2, ensure_ascii=False))
    elif features:
        for i, unit in enumerate(units):
            print("\n" * (i > 0) + "\n".join(unit_lines(unit)))
    else:
        _print_list(units)
        if pairs:
            name = f"{pairs[0][0]}/{pairs[0][1]}"
            print(f"\nAll about one: fastadapt features show {run} {name}")
    return 0


def _print_list(units: Sequence[UnitDetails]) -> None:
    print_table(UNIT_HEAD, [unit_row(unit) for unit in units], left=True)


def effects(
    run: str,
    *,
    store: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    config: Annotated[EffectsConfig, Typed(flags=True)],
) -> int:
    """Measure what the strongest features do to the output: ablate each one, and measure the rise
    of the KL to the target on the texts of the store.

    Args:
        run: a run with collected features
        store: store of the features; by default features in the run
        dtype: dtype of weights and streams; by default as collected
    """
    from fastadapt.effects.ablation import effects as measure_effects
    from fastadapt.features.store.details import read_details

    with stoppable() as (stop, progress):
        rows = measure_effects(
            run,
            store,
            config,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=partial(progress, "texts"),
            stop=stop,
        )
    if rows is None:
        print("Stopped; nothing was written.")
        return 0
    pairs = zip(rows["layer"].to_pylist(), rows["feature"].to_pylist(), strict=True)
    units = read_details(Store.open(store or run), list(pairs), examples=0)
    _print_list(sorted(units, key=lambda unit: -(unit.delta_kl or 0.0)))
    print(
        f"\nΔKL: rise of the KL to the target without the feature, nats per token; mean over "
        f"{rows['positions'][0].as_py():,} predicted tokens of the store's texts."
    )
    return 0


def trace(
    run: str,
    prompt: str,
    *,
    response: str | None = None,
    max_new_tokens: int = 64,
    plain: bool = False,
    prefill: Prefill | None = None,
    top: int = 3,
    no_base: bool = False,
    json: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> int:
    """Show, for each token of a prompt and its response, which features fire, what they promote,
    and the KL of base, hybrid and adapter to the target's next-token distribution.

    Args:
        run: folder of a finished run, or its name on the hub, OWNER/NAME
        prompt: a user's prompt, rendered as the training data of the run were
        response: text of the response; by default the most likely response of the target
        max_new_tokens: number of tokens of the target's response, at most; 0: the prompt alone
        plain: read the prompt as it is, without the markers of a conversation
        prefill: whether the prompt opens the response's reasoning: thinking or none; by default as
            the chat template of the run's family, and none with --response
        top: features shown per token
        no_base: leave out the base, which is then not loaded as a whole model
        json: print JSON
    """
    from fastadapt.effects.generate import GenerateConfig, generate
    from fastadapt.effects.requests import prompt_ids, response_ids
    from fastadapt.effects.trace import trace as trace_text

    for name, value in (("--max_new_tokens", max_new_tokens), ("--top", top)):
        if value < 0:
            raise UserError(f"{name}: expected 0 or more, got {value}")
    loaded = _load(run, dtype, device, trust_remote_code)
    if response is not None and not plain:
        prefill = prefill or "none"
    ids = prompt_ids(loaded.models, prompt, plain=plain, prefill=prefill)
    answer: list[int] = []
    if response is not None:
        if response:
            answer = response_ids(loaded.models, response, plain=plain, prefill=prefill)
    elif max_new_tokens:
        settings = GenerateConfig(models=("target",), max_new_tokens=max_new_tokens)
        (generated,) = generate(loaded, ids, settings)
        answer = generated.tokens
    traced = trace_text(loaded, ids + answer, len(ids), base=not no_base)
    if json:
        print(json_module.dumps(asdict(traced), indent=2, ensure_ascii=False))
    else:
        tokens, means, features = trace_tables(loaded, traced, top)
        print_table(*tokens, left=True)
        print(
            "\nA KL is followed by the model's most likely next token unless it is the target's.\n"
        )
        for note in traced.notes.values():
            print(f"{note}\n")
        print_table(*means)
        print()
        print_table(*features, left=True)
    return 0


def _load(run: str, dtype: str | None, device: str | None, trust: bool) -> LoadedRun:
    from fastadapt.effects.requests import RUN
    from fastadapt.effects.run import load

    loaded = load(run, dtype=dtype, device=device, trust_remote_code=trust)
    if loaded.models.compared[RUN].kind != "transcoder":
        raise UserError(f"{run}: this run trained no transcoders, so it has no features")
    return loaded


def generate(
    run: str,
    prompt: str,
    *,
    without: tuple[str, ...] = (),
    scale: tuple[str, ...] = (),
    models: tuple[str, ...] = ("adapter",),
    temperature: float = 0.0,
    max_new_tokens: int = 512,
    seed: int = 0,
    plain: bool = False,
    prefill: Prefill | None = None,
    json: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> int:
    """Generate a response with a run's adapter, with features removed or scaled, or with the other
    models of the pair.

    Args:
        run: folder of a finished run, or its name on the hub, OWNER/NAME
        prompt: a user's prompt, rendered as the training data of the run were
        without: features to remove: sets of the run, or features such as 2/17,3/401
        scale: features and their factor, such as 2/17=0 or a set with hesitation=-0.5
        models: models to generate with: any of base, hybrid, adapter, target
        temperature: temperature of the softmax; 0 takes the most likely token
        max_new_tokens: largest number of tokens of a response
        seed: seed of the random numbers
        plain: read the prompt as it is, without the markers of a conversation
        prefill: whether the prompt opens the response's reasoning: thinking or none; by default as
            the chat template of the run's family
        json: print JSON
    """
    from fastadapt.effects.generate import GenerateConfig
    from fastadapt.effects.generate import generate as generate_responses
    from fastadapt.effects.requests import factors_of, prompt_ids

    settings = GenerateConfig(
        tuple(models), temperature=temperature, max_new_tokens=max_new_tokens, seed=seed
    )
    loaded = _load(run, dtype, device, trust_remote_code)
    factors = factors_of(loaded, without, scale)
    settings.check_factors(factors)
    ids = prompt_ids(loaded.models, prompt, plain=plain, prefill=prefill)
    obstacle = loaded.models.base_obstacle(ids) if "base" in settings.models else None
    if obstacle is not None:
        say(f"note: the base cannot read this prompt as the target does: {obstacle}")
    responses = generate_responses(loaded, ids, settings, factors)
    if json:
        print(json_module.dumps([asdict(each) for each in responses], indent=2, ensure_ascii=False))
        return 0
    print(visible_lines(responses_text(responses)))
    for each in responses:
        if each.finish == "length":
            say(f"{each.model}: ended after {len(each.tokens):,} tokens (--max_new_tokens)")
    return 0


def changes(
    run: str,
    *,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    config: Annotated[ChangesConfig, Typed(flags=True)],
) -> int:
    """Write the page 'what changed' of a run: effects by layer and by feature, the positions where
    hybrid and target disagree most and the features that close the gap, and responses of base,
    hybrid, adapter and target side by side.

    Args:
        run: a run with collected features
        dtype: dtype of weights and streams; by default as collected
    """
    from fastadapt.effects.changes import changes as measure_changes
    from fastadapt.effects.page import write_changes

    folder = typed_path(run, "run")
    collected = Store.open(folder).manifest["pair"].get("dtype")
    loaded = _load(run, dtype or collected, device, trust_remote_code)
    with stoppable() as (stop, progress):
        measured = measure_changes(loaded, config, progress=progress, stop=stop)
    if measured is None:
        print("Stopped; nothing was written.")
        return 0
    for note in measured["notes"]:
        say(note)
    page = write_changes(folder, measured, folder.resolve().name)
    kl = measured["kl"]
    print(
        f"KL to the target, nats per token: hybrid {number(kl['hybrid'])}, adapter "
        f"{number(kl['adapter'])}"
    )
    print(f"what changed: {page.resolve()}")
    return 0


def intervene(
    run: str,
    *,
    ablate: str | None = None,
    only: str | None = None,
    onto_target: Annotated[str | None, Typed("--onto-target")] = None,
    scale: float | None = None,
    output: str,
    store: str | None = None,
    overwrite: bool = False,
) -> int:
    """Change a run's adapter by one of --ablate, --only and --onto-target, and save it as a run of
    its own, which evaluation, generation and serving read like any other.

    Args:
        run: a run; with collected features for a set of the run
        ablate: remove these features: a set of the run, its file, or features such as 2/17,3/401
        only: remove all other features; none: remove every feature, which leaves the bias b_dec
        onto_target: add these features, scaled, to the target itself
        scale: factor of --onto-target, such as -0.5
        output: a new folder
        store: store of the features; by default features in the run
        overwrite: replace an earlier intervention in the folder
    """
    from fastadapt.features.store.sets import find_set
    from fastadapt.interventions import Intervention
    from fastadapt.interventions.files import intervene as save_intervention
    from fastadapt.interventions.files import named_features, no_features

    typed = {"ablate": ablate, "only": only, "onto-target": onto_target}
    chosen = {kind: name for kind, name in typed.items() if name is not None}
    if len(chosen) != 1:
        got = ", ".join(f"--{kind}" for kind in chosen) or "none"
        raise UserError(f"expected one of --ablate, --only, --onto-target, got {got}")
    ((kind, name),) = chosen.items()
    if (kind, name) == ("only", "none"):
        features = no_features(run)
    elif "/" in name and not name.endswith(".json") and store is None:
        features = named_features(run, name.split(","))
    else:
        features = find_set(store or run, name)
    folder = save_intervention(
        run,
        output,
        features,
        Intervention(kind, scale=scale),  # type: ignore[arg-type]
        overwrite=overwrite,
    )
    print(f"adapter: {folder.resolve()}")
    # --onto-target makes another pair, the target with itself, which shares no evaluation.
    source = "" if kind == "onto-target" else f"{run} "
    print(f"Compare with:  fastadapt eval {source}{folder}")
    return 0
