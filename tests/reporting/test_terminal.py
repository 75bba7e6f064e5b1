"""Tables of text are text wherever they are written."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from fastadapt.reporting.terminal import table_text


def test_a_table_of_text_is_text_in_a_notebook_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There rich displays what it prints; the control is a console without the setting."""
    table = ["model", "KL"], [["hybrid", "1.49"]]
    expected = table_text(*table)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert Console(file=StringIO()).is_jupyter
    assert table_text(*table) == expected
    assert expected.splitlines()[-1] == "hybrid │ 1.49"
    assert capsys.readouterr().out == ""
