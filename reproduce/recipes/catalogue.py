"""The list of pairs and recipes, ``recipes.yaml``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from typing_extensions import NotRequired, TypedDict

from fastadapt.cli.train import read_configs
from fastadapt.errors import UserError
from fastadapt.io.documents import Count, Finite, Name, Positive, read_yaml
from fastadapt.training.config import TrainConfig, from_dict

CATALOGUE = Path(__file__).with_name("recipes.yaml")
#: Names of pairs and recipes, which are names of folders too.
Label = Annotated[str, msgspec.Meta(pattern="^[a-z0-9][a-z0-9.-]*$", max_length=40)]
#: Values by setting, each named as on the command line.
Settings = dict[Annotated[str, msgspec.Meta(pattern=r"^[a-z]+\.[a-z0-9_]+$")], Any]
BASELINE = "l1"
#: Least number of values of the setting that moves L0.
LEAST = 3


class Judged(TypedDict):
    """What the judge of descriptions reads.

    ``seeds``: number of seeds whose features are judged, from the first. ``texts``: held-out texts
    that features are collected from. ``units``: largest number of features of a layer. ``before``
    and ``after``: tokens of an example around the active one.
    """

    seeds: Count
    texts: Positive
    units: Positive
    before: Count
    after: Count


class Needs(TypedDict):
    """Files that a command makes before a pair can be used."""

    paths: list[Name]
    command: Name


class Pair(TypedDict):
    """A pair of models, and the settings that all recipes share on it.

    ``l0``: at which recipes are compared, beside that of the baseline's middle value. ``texts``:
    number of held-out texts that are measured.
    """

    title: Name
    config: Name
    l0: list[Annotated[float, msgspec.Meta(gt=0, le=1e6)]]
    settings: Settings
    texts: Positive
    judged: Judged
    needs: NotRequired[Needs]


class Recipe(TypedDict):
    """A recipe; ``values`` are those of ``setting``, by pair. Not every pair needs some."""

    name: Label
    description: Name
    setting: Annotated[str, msgspec.Meta(pattern=r"^[a-z]+\.[a-z0-9_]+$")]
    values: dict[Label, Annotated[list[Finite], msgspec.Meta(min_length=LEAST)]]
    overrides: NotRequired[Settings]
    baseline: NotRequired[Label]


class Catalogue(TypedDict):
    """Pairs by name, and recipes in the order of the tables."""

    pairs: dict[Label, Pair]
    recipes: list[Recipe]


def read_catalogue(path: Path = CATALOGUE) -> Catalogue:
    """Read and check a list of pairs and recipes.

    Raises:
        UserError: the file is damaged, two recipes have one name, a baseline or a pair is unknown,
            or a value is given twice.
    """
    catalogue: Catalogue = read_yaml(path, Catalogue)
    names = [recipe["name"] for recipe in catalogue["recipes"]]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: recipes: expected each name once, got {', '.join(names)}")
    values_by_name = {recipe["name"]: recipe["values"] for recipe in catalogue["recipes"]}
    for recipe in catalogue["recipes"]:
        source, baseline = f"{path}: {recipe['name']}", baseline_of(recipe)
        if baseline not in names:
            expected = ", ".join(names)
            raise UserError(f"{source}: baseline: expected one of {expected}, got {baseline}")
        for pair, values in recipe["values"].items():
            if pair not in catalogue["pairs"]:
                expected = ", ".join(catalogue["pairs"])
                raise UserError(f"{source}: values: expected pairs {expected}, got {pair}")
            if len(set(values)) < len(values):
                raise UserError(f"{source}: values: expected each value once, got {values}")
            if pair not in values_by_name[baseline]:
                raise UserError(f"{source}: values: its baseline {baseline} has none for {pair}")
    return catalogue


def baseline_of(recipe: Recipe) -> str:
    """Return the name of the recipe that a recipe is compared with; its own for a baseline."""
    return recipe.get("baseline", BASELINE)


def check_present(pairs: Mapping[str, Pair]) -> None:
    """Raise ``UserError`` if a pair needs files that do not exist, naming the command for them."""
    for name, pair in pairs.items():
        needs = pair.get("needs", {"paths": [], "command": ""})
        for path in needs["paths"]:
            if not Path(path).exists():
                raise UserError(
                    f"the pair {name} needs {path}, which does not exist; run {needs['command']}, "
                    "or name other pairs by --pairs"
                )


def chosen(named: Sequence[str] | None, known: Sequence[str], option: str) -> list[str]:
    """Return the names that an option gives, in the known order; all without the option.

    Raises:
        UserError: a name is unknown.
    """
    for name in named or ():
        if name not in known:
            raise UserError(f"{option}: expected some of {', '.join(known)}, got {name}")
    return [name for name in known if named is None or name in named]


def values_of(pair: Pair, recipe: Recipe, value: float, seed: int) -> dict[str, Any]:
    """Return the settings of a run by component, without defaults and without its folder.

    Args:
        pair, recipe: whose settings are merged, the recipe's over the pair's.
        value: of the setting that moves L0.
        seed: of the run.

    Raises:
        UserError: the pair's configuration cannot be read.
    """
    values = read_configs([pair["config"]])
    typed = {
        **pair["settings"],
        **recipe.get("overrides", {}),
        recipe["setting"]: value,
        "run.seed": seed,
        "run.threads": 1,
        "run.eval_every": 0,
        "run.report": False,
        "data.max_validation": 1,  # the measurement reads more, and once
    }
    for name, setting in typed.items():
        component, key = name.split(".")
        values.setdefault(component, {})[key] = setting
    values["run"].pop("output", None)
    return values


def config_of(values: Mapping[str, Any], output: Path) -> TrainConfig:
    """Return the configuration of a run with settings from :func:`values_of`.

    Raises:
        UserError: a setting is unknown, or its value impossible.
    """
    run = {**values["run"], "output": str(output)}
    config: TrainConfig = from_dict({**values, "run": run})
    return config
