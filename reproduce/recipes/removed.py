"""Results of recipes whose options have left the code: ``removed.json``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from typing_extensions import TypedDict

from fastadapt.errors import UserError
from fastadapt.io.documents import read_json
from fastadapt.io.names import has_file
from reproduce.parts import write
from reproduce.recipes.catalogue import Recipe
from reproduce.recipes.folder import Part
from reproduce.recipes.measure import Measured
from reproduce.recipes.results import Runs, gather

REMOVED = Path(__file__).with_name("removed.json")


class RemovedRecipe(TypedDict):
    """A recipe, and what was measured of its parts."""

    recipe: Recipe
    parts: list[Measured]


class RemovedFile(TypedDict):
    """Contents of ``removed.json``."""

    schema_version: Literal[1]
    recipes: list[RemovedRecipe]


@dataclass(frozen=True)
class Removed:
    """The recorded recipes."""

    recipes: Sequence[RemovedRecipe]

    def runs(self, pair: str, shared: Collection[str], present: Collection[str]) -> list[Runs]:
        """Return the runs on a pair of recipes that are not in the list any more.

        Runs with other settings, weights or texts of the pair cannot be compared, and are left out.

        Args:
            pair: name of the pair.
            shared: ``shared`` of what is measured of the pair.
            present: names of the listed recipes.
        """
        kept_runs = []
        for each in self.recipes:
            name = each["recipe"]["name"]
            measured = {
                (name, part["value"], part["seed"]): part
                for part in each["parts"]
                if part["pair"] == pair and part["shared"] in shared
            }
            if name not in present:
                kept_runs += gather([each["recipe"]], pair, measured, is_removed=True)
        return kept_runs


def read_removed(path: Path) -> Removed:
    """Read the recorded recipes; none without the file.

    Raises:
        UserError: the file is damaged.
    """
    if not has_file(path):
        return Removed([])
    held: RemovedFile = read_json(path, RemovedFile)
    return Removed(held["recipes"])


def record(path: Path, parts: Sequence[Part]) -> None:
    """Add the results of a recipe to the file, in place of earlier ones.

    Raises:
        UserError: nothing is measured of the recipe, or the file is damaged.
    """
    recipe = parts[0].recipe
    measured = [each for part in parts if (each := part.measured()) is not None]
    if not measured:
        raise UserError(f"--record: nothing is measured of {recipe['name']} yet; run it first")
    others = [each for each in read_removed(path).recipes if each["recipe"] != recipe]
    others = [each for each in others if each["recipe"]["name"] != recipe["name"]]
    recipes = [*others, {"recipe": recipe, "parts": measured}]
    write(path, {"schema_version": 1, "recipes": recipes}, indent=None)
