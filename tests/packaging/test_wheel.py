"""The wheel contains all files under one top-level name, and works outside the repository."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_fastadapt_is_the_only_top_level_name(names: set[str]) -> None:
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"fastadapt"}


def test_the_wheel_contains_every_source_file(names: set[str], root: Path) -> None:
    """The wheel contains code, presets, the embedded pair and py.typed."""
    expected = set()
    for folder, prefix in (("fastadapt", "fastadapt"), ("kernels", "fastadapt/kernels")):
        for path in (root / folder).rglob("*"):
            file = path.relative_to(root / folder)
            is_cache = any(part.startswith((".", "__pycache__")) for part in file.parts)
            if path.is_file() and not is_cache:
                expected.add(f"{prefix}/{file.as_posix()}")
    assert {name for name in names if name.startswith("fastadapt/")} == expected
    assert "fastadapt/py.typed" in names
    assert "fastadapt/kernels/transcoder/__init__.py" in names
    assert any(name.startswith("fastadapt/presets/") for name in names)
    for model in ("base", "target"):
        assert f"fastadapt/organism/{model}/model.safetensors" in names


def test_license_and_command_are_declared(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = wheel.name.rsplit("-", 3)[0] + ".dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        assert "License-Expression: Apache-2.0" in metadata
        assert "Requires-Python: >=3.10" in metadata
        assert f"{info}/licenses/LICENSE" in archive.namelist()
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert entry_points.splitlines() == [
        "[console_scripts]",
        "fastadapt = fastadapt.cli.main:main",
        "",
        "[vllm.general_plugins]",
        "fastadapt = fastadapt.serving.vllm_plugin:register",
    ]
    extras = "flash peft tensorboard wandb trackio eval features lowmem interop bench dev"
    for extra in extras.split():
        assert f"Provides-Extra: {extra}\n" in metadata


CALL = """
import json, torch, kernels, fastadapt, fastadapt.kernels.transcoder as op
x = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
out = op.transcoder(x, torch.eye(2), torch.zeros(2), 2 * torch.eye(2), torch.ones(2)).out
print(json.dumps({
    "out": out.tolist(),
    "files": [fastadapt.__file__, op.__file__, kernels.__file__],
    "get_kernel": hasattr(kernels, "get_kernel"),
}))
"""


@pytest.mark.slow
def test_the_wheel_works_beside_hugging_faces_kernels(
    run: Callable[..., str], installed: Path, tmp_path: Path
) -> None:
    result = json.loads(run(CALL, cwd=tmp_path, path=installed))
    assert result["out"] == [[3.0, 1.0], [7.0, 9.0]]
    assert [Path(file).relative_to(installed).as_posix() for file in result["files"]] == [
        "fastadapt/__init__.py",
        "fastadapt/kernels/transcoder/__init__.py",
        "kernels/__init__.py",
    ]
    assert result["get_kernel"], "`import kernels` is not Hugging Face's"


DISTRIBUTIONS = """
from importlib.metadata import packages_distributions
print(packages_distributions().get("kernels"))
"""


@pytest.mark.parametrize("where", ["installed", "repository"])
def test_the_distribution_does_not_provide_the_package_kernels(
    where: str, run: Callable[..., str], installed: Path, root: Path, tmp_path: Path
) -> None:
    if where == "installed":
        distributions = run(DISTRIBUTIONS, cwd=tmp_path, path=installed)
    else:
        distributions = run(DISTRIBUTIONS, cwd=root)
    assert "fastadapt" not in distributions
    assert "kernels" in distributions
