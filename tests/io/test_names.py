"""Names that become paths must be plain and stay in their folder."""

from pathlib import Path
from typing import Any

import pytest

from fastadapt.errors import UserError
from fastadapt.io.names import check_name, inside

ODD: list[Any]
ODD = ["", ".", "..", "../x", "/abs", "a/b", "a\\b", "C:x", "a\0b", "a\nb", "x" * 300, "é" * 130]
ODD += ["\ud800", 3, None, True, ["x"]]


@pytest.mark.parametrize("name", ODD, ids=lambda name: ascii(name)[:20])
def test_odd_names_are_refused(name: object, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="index: expected the name of a file in its folder, got"):
        check_name(name, "index")
    with pytest.raises(UserError, match="expected the name of a file"):
        inside(tmp_path, "adapter", name, source="index")


@pytest.mark.parametrize("name", ["a.safetensors", ".hidden", "...", "x" * 255, "Größe 1"])
def test_plain_names_are_paths(name: str, tmp_path: Path) -> None:
    assert inside(tmp_path, name, source="index") == tmp_path / name


def test_links_may_not_lead_out(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "own").write_text("x")
    (folder / "out").symlink_to("../secret")
    (folder / "in").symlink_to("own")
    with pytest.raises(UserError, match="is a link that leads out of"):
        inside(folder, "out", source="index")
    assert inside(folder, "in", source="index") == folder / "in"
    assert inside(folder, "out", source="index", follow_links=True) == folder / "out"


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert inside(tmp_path / "link", "x", source="index") == tmp_path / "link" / "x"
