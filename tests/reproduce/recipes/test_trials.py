"""The table of options that were tried by a patch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastadapt.errors import UserError
from reproduce.recipes.trials import TRIALS, trials_table


def test_every_trial_is_a_row_with_its_numbers() -> None:
    groups = json.loads(TRIALS.read_text())["groups"]
    trials = [trial for group in groups for trial in group["trials"]]
    table = trials_table()
    assert [row[0] for row in table.rows] == [trial["name"] for trial in trials]
    first = trials[0]
    assert f"{first['run']['kl']:.4f}" in table.rows[0][3]
    assert f"{first['reference']['kl']:.4f}" in table.rows[0][5]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trials.json"
    path.write_text(TRIALS.read_text().replace('"kl": ', '"kl": -', 1))
    with pytest.raises(UserError, match=r"trials\.json: groups\[0\]\.trials\[0\]\.run\.kl"):
        trials_table(path)
