"""Importing is fast and without side effects; ``kernels/`` at the root shadows no package."""

import importlib.metadata
import json
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

import fastadapt

SECONDS = 0.3


def test_the_public_names_are_these() -> None:
    assert fastadapt.__all__ == [
        "SAE",
        "AdapterConfig",
        "LoadedRun",
        "ModelPair",
        "PairConfig",
        "PairMismatchError",
        "ReplacementModel",
        "RunError",
        "Transcoder",
        "TranscoderAdapter",
        "UserError",
        "__version__",
        "load",
        "load_adapters",
        "load_run",
        "save_adapters",
        "scale_features",
    ]
    for name in fastadapt.__all__:
        assert hasattr(fastadapt, name)
    assert fastadapt.__version__ == importlib.metadata.version("fastadapt")


TIMED = """
import json, sys, time, torch
start = time.perf_counter()
import fastadapt
seconds = time.perf_counter() - start
heavy = [name for name in ("transformers", "triton", "datasets") if name in sys.modules]
print(json.dumps([seconds, heavy]))
"""


def test_import_is_quick_and_light(run: Callable[..., str], tmp_path: Path) -> None:
    # One of five is enough: the first run writes byte code, and other load only adds time.
    for _ in range(5):
        seconds, heavy = json.loads(run(TIMED, cwd=tmp_path))
        assert heavy == []
        if seconds < SECONDS:
            return
    pytest.fail(f"import fastadapt took {seconds:.2f} s, expected less than {SECONDS}")


LIGHT = """
import json, sys, torch
before = set(sys.modules)
import fastadapt.kernels.transcoder
from fastadapt import SAE, AdapterConfig, Transcoder, TranscoderAdapter
imported = {name.partition(".")[0] for name in set(sys.modules) - before}
for module in (SAE(4, AdapterConfig(8)), Transcoder(4, AdapterConfig(8, "topk", k=2), skip=True)):
    module(torch.randn(3, 4)).sum().backward()
TranscoderAdapter(4, AdapterConfig(8))(torch.randn(3, 4))
others = {"transformers", "datasets", "triton", "safetensors", "huggingface_hub", "msgspec"}
imported -= set(sys.stdlib_module_names)
print(json.dumps([sorted(imported), sorted(others & set(sys.modules))]))
"""


def test_the_op_and_its_modules_need_torch_alone(run: Callable[..., str], tmp_path: Path) -> None:
    imported, used = json.loads(run(LIGHT, cwd=tmp_path))
    assert imported == ["fastadapt"]
    assert used == []


VECTOR_MATH = """
import torch
called = []
cos = torch.cos
torch.cos = lambda x: called.append(str(x.dtype)) or cos(x)
import fastadapt.kernels.transcoder
print(torch.backends.mkl.is_available(), *called)
"""


def test_importing_an_op_calls_the_vector_functions_once(
    run: Callable[..., str], tmp_path: Path
) -> None:
    """Their first results may be wrong; see :mod:`fastadapt.kernels.vector_math`."""
    has_mkl, *dtypes = run(VECTOR_MATH, cwd=tmp_path).split()
    assert dtypes == (["torch.float32", "torch.float64"] if has_mkl == "True" else [])


IMPORT_ALL = """
import importlib, pkgutil, sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        raise RuntimeError(f"{event} {arguments}")

sys.addaudithook(refuse)
import fastadapt
names = ["fastadapt"]
folders = [(fastadapt.__path__, "fastadapt.")]
for paths, prefix in folders:
    for module in pkgutil.iter_modules(paths, prefix):
        names.append(module.name)
        loaded = importlib.import_module(module.name)
        if module.ispkg:
            folders.append((loaded.__path__, module.name + "."))
print(*names)
"""


def test_no_module_uses_the_network_when_imported(
    run: Callable[..., str], installed: Path, tmp_path: Path
) -> None:
    names = run(IMPORT_ALL, cwd=tmp_path, path=installed).split()
    assert {"fastadapt.cli.main", "fastadapt.kernels.linear_kl", "fastadapt.data.sources"} <= set(
        names
    )


FROM_THE_ROOT = """
import importlib.metadata, importlib.util, json
spec = importlib.util.find_spec("kernels")
from transformers import Qwen2ForCausalLM
try:
    version = importlib.metadata.version("kernels")
except importlib.metadata.PackageNotFoundError:
    version = None
folders = list(spec.submodule_search_locations)
print(json.dumps([Qwen2ForCausalLM.__name__, version, spec.origin, folders]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "present",
    [pytest.param(True, marks=pytest.mark.slow, id="present"), pytest.param(False, id="absent")],
)
def test_transformers_models_import_from_the_root(
    present: bool, run: Callable[..., str], root: Path, tmp_path: Path
) -> None:
    """transformers imports with and without Hugging Face's ``kernels``.

    The copy of site-packages is a folder of links, used without ``site``, so that no other folder
    is on the path. Without the package, ``kernels`` is the folder at the root, a namespace without
    code.
    """
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        hidden = entry.name == "kernels" or entry.name.startswith("kernels-")
        if entry.suffix != ".pth" and (present or not hidden):
            (tmp_path / entry.name).symlink_to(entry)
    printed = run(FROM_THE_ROOT, "-S", cwd=root, path=tmp_path)
    name, version, origin, locations = json.loads(printed)
    assert name == "Qwen2ForCausalLM"
    if present:
        assert version is not None
        assert origin == str(tmp_path / "kernels" / "__init__.py")
    else:
        assert version is None
        assert origin is None
        assert [Path(location).resolve() for location in locations] == [root / "kernels"]
