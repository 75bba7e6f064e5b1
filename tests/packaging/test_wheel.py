"""The wheel contains all files under one top-level name, and works outside the repository."""

import json
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import fastadapt


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
    extras = "flash peft tensorboard wandb trackio eval features lowmem interop bench dev docs"
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


@pytest.mark.slow
def test_the_source_distribution_builds_the_same_wheel(
    sdist: Path, wheel: Path, build_wheel: Callable[[Path, Path], Path], tmp_path: Path
) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert source.name == f"fastadapt-{fastadapt.__version__}"
    assert {path.name for path in source.iterdir()} == {
        *("CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md"),
        *("fastadapt", "fastadapt.egg-info", "kernels", "pyproject.toml", "setup.cfg", "setup.py"),
    }
    rebuilt = build_wheel(source, tmp_path / "rebuilt")
    assert rebuilt.name == wheel.name
    contents = []
    for path in (wheel, rebuilt):
        with zipfile.ZipFile(path) as archive:
            contents.append({name: archive.read(name) for name in archive.namelist()})
    assert contents[0] == contents[1]


@pytest.mark.slow
def test_the_installed_command_runs(installed: Path, tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("COVERAGE_", "PYTHON"))}
    result = subprocess.run(
        [installed / "bin" / "fastadapt", "--version"],
        cwd=tmp_path,
        env=env | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"fastadapt {fastadapt.__version__}\n"


IMPORT = """
import json, torch, fastadapt
from fastadapt import AdapterConfig, TranscoderAdapter
out, aux = TranscoderAdapter(8, AdapterConfig(32))(torch.ones(2, 8))
print(json.dumps([fastadapt.__file__, fastadapt.__version__, list(out.shape)]))
"""


@pytest.mark.slow
def test_the_installed_package_is_imported(
    run: Callable[..., str], installed: Path, tmp_path: Path
) -> None:
    file, version, shape = json.loads(run(IMPORT, cwd=tmp_path, path=installed))
    assert Path(file) == installed / "fastadapt" / "__init__.py"
    assert (version, shape) == (fastadapt.__version__, [2, 8])


@pytest.mark.slow
def test_the_readmes_python_block_runs_from_the_wheel(
    run: Callable[..., str], installed: Path, root: Path, tmp_path: Path
) -> None:
    readme = (root / "README.md").read_text(encoding="utf-8")
    ((code, shown),) = re.findall(
        r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", readme, re.MULTILINE | re.DOTALL
    )
    shutil.copytree(root / "tests/cli/old_files/finished", tmp_path / "runs/organism")
    printed = run(code, cwd=tmp_path, path=installed)
    # In this run other features fire than in the README's: heads and tokens are the same.
    outline = [["", "token", "features: activation, promotes"]]
    outline += [[str(i), token] for i, token in enumerate(("␣tom", "␣has", "␣3", "␣apples"))]
    for text in (shown, printed.partition("\n\n")[0]):
        head, _, *rows = text.splitlines()
        cells = [re.split("┃", head), *(row.split("│")[:2] for row in rows)]
        assert [[cell.strip() for cell in row] for row in cells] == outline
        for row in rows:  # a feature, its activation, what it promotes
            assert re.search(r"│ \d/\d+ [\d.]+ ␣\S+", row) or row.rstrip().endswith("│")


def test_versions_agree(wheel: Path, root: Path) -> None:
    """Wheel, package, citation and the newest entry of the changelog have one version."""
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(r"^## \[(\S+)\]", changelog, re.MULTILINE)
    assert newest is not None
    assert newest[1] == citation["version"] == wheel.name.split("-")[1] == fastadapt.__version__


def test_the_readme_names_every_extra(wheel: Path, root: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = wheel.name.rsplit("-", 3)[0] + ".dist-info"
        metadata = archive.read(f"{info}/METADATA").decode().partition("\n\n")[0]
    extras = set(re.findall(r"^Provides-Extra: (\S+)$", metadata, re.MULTILINE)) - {"interop"}
    pages = [
        (root / name).read_text(encoding="utf-8") for name in ("README.md", "docs/your-pair.md")
    ]
    for page in pages:
        assert {extra for extra in extras if not re.search(rf"\b{extra}\b", page)} == set()
