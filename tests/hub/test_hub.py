"""Runs pushed to a local hub and loaded from it, with the hub's own client."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from fake_hub import FakeHub, serving

import fastadapt
from fastadapt import AdapterConfig, RunError, TranscoderAdapter, UserError, save_adapters
from fastadapt.adapter.files import CARD, adapter_digest
from fastadapt.hub.names import is_local
from fastadapt.hub.paths import check_private, portable
from fastadapt.hub.push import push
from fastadapt.interventions import Intervention
from fastadapt.interventions.files import intervene, named_features
from fastadapt.reporting.formatting import number, percent

FINISHED = Path(__file__).parents[1] / "cli" / "old_files" / "finished"
ADAPTERS = [CARD, *(f"layer_{i}.safetensors" for i in range(4))]

# The client of the hub warns about its own call of the HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub whose address, cache and token are those of the client, as HF_ENDPOINT would set it."""
    from huggingface_hub import constants

    with serving() as server:
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_DISABLE_PROGRESS_BARS": True,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", "hf_ann")
        monkeypatch.chdir(tmp_path)
        yield server
        huggingface_hub.close_session()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of the embedded pair, whose files name folders of this machine."""
    folder = tmp_path / "here" / "run"
    shutil.copytree(FINISHED, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["run"]["output"] = str(folder)
    config["data"]["train"] = str(tmp_path / "chats.jsonl")
    config["data"]["family"] = {"user": ["/u ", " /e"], "assistant": ["/a ", " /e"]}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"output": str(folder), "adapter": str(folder / "adapter")}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "weights.safetensors").write_bytes(b"large")
    return folder


def change(run: Path) -> None:
    """Change a layer of a run's adapter."""
    save_adapters(
        [TranscoderAdapter(128, AdapterConfig(16)) for _ in range(4)],
        run / "adapter",
        json.loads((run / "adapter" / CARD).read_text())["metadata"],
    )


def test_a_run_is_pushed_and_loaded(
    hub: FakeHub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastadapt.cli.main import main

    assert main(["push", str(run), "ann/run", "--license", "Apache-2.0"]) == 0
    repository = hub.repositories["ann/run"]
    shown = capsys.readouterr().out
    assert f"commit: {repository.head}\n" in shown
    assert f"fastadapt.load('ann/run', revision='{repository.head}')" in shown
    ours = {"README.md", "config.yaml", "summary.json", *(f"adapter/{name}" for name in ADAPTERS)}
    assert set(repository.files) == {".gitattributes", *ours}
    assert len(repository.commits) == 2
    assert not repository.private
    for name, content in repository.files.items():
        assert str(tmp_path).encode() not in content, name

    loaded = fastadapt.load("ann/run", device="cpu")
    assert loaded.commit == repository.head
    assert adapter_digest(loaded.models.folder("run")) == adapter_digest(run / "adapter")
    assert loaded.config is not None
    assert loaded.config.adapter.n_features == 16
    assert loaded.config.data.train == "chats.jsonl"
    assert loaded.config.data.family == {"user": ["/u ", " /e"], "assistant": ["/a ", " /e"]}
    assert loaded.store is None
    for text in (repr(loaded), loaded._repr_html_()):
        assert "ann/run" in text
        assert repository.head in text
    with pytest.raises(UserError, match="no features were collected from this run yet"):
        loaded.feature(2, 7)
    collected = fastadapt.load("ann/run", store=run / "features")
    assert repr(collected.feature(2, 7)) == repr(fastadapt.load(run).feature(2, 7))


def test_the_card_has_the_figures_of_the_summary(hub: FakeHub, run: Path) -> None:
    push(run, "ann/run", license="apache-2.0")
    card = hub.repositories["ann/run"].files["README.md"].decode()
    summary = json.loads((run / "summary.json").read_text())
    _, header, body = card.split("---\n", 2)
    values = yaml.safe_load(header)
    assert values["license"] == "apache-2.0"
    assert values["library_name"] == "fastadapt"
    assert "base_model" not in values  # the embedded pair is on no hub
    for figure in (
        number(summary["kl_hybrid"]),
        number(summary["kl_adapter"]),
        percent(summary["top1_error_adapter"]),
        number(summary["l0_mean"]),
        number(summary["tokens"]),
        "0.0300",  # λ
        "organism/target",
        "organism/base",
        "chats.jsonl",
        "transformers 5.22.2",
        "is **added** to the output",
    ):
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.]*\d)", body), figure
    push(run, "ann/unlicensed")
    card = hub.repositories["ann/unlicensed"].files["README.md"].decode()
    assert "No licence was stated" in card
    assert "license" not in yaml.safe_load(card.split("---\n")[1])


def test_the_card_names_what_a_run_began_as(hub: FakeHub, run: Path, tmp_path: Path) -> None:
    start = {"run": str(tmp_path / "earlier"), "adapter": "ab" * 32}
    path = run / "adapter" / CARD
    card = json.loads(path.read_text())
    card["metadata"]["init_from"] = start
    path.write_text(json.dumps(card))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["run"]["init_from"] = start["run"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    push(run, "ann/run")
    files = hub.repositories["ann/run"].files
    shown = "| began as | the adapters of earlier (SHA-256 abababababab) |"
    assert shown in files["README.md"].decode()
    for name, content in files.items():
        assert str(tmp_path).encode() not in content, name
    assert fastadapt.load("ann/run", device="cpu").config is not None


def test_texts_of_a_run_cannot_write_into_its_card(hub: FakeHub, run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["validation"] = "a|b\n<script>alert(1)</script>\u202e"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    push(run, "ann/run")
    card = hub.repositories["ann/run"].files["README.md"].decode()
    (row,) = [line for line in card.splitlines() if line.startswith("| held-out data")]
    assert "a\\|b↵&lt;script&gt;alert(1)&lt;/script&gt;⟨U+202E⟩" in row


def test_a_revision_is_the_run_of_its_commit(hub: FakeHub, run: Path) -> None:
    first = push(run, "ann/run").commit
    before = adapter_digest(run / "adapter")
    change(run)
    second = push(run, "ann/run").commit
    hub.repositories["ann/run"].tags["v1"] = first
    after = adapter_digest(run / "adapter")
    assert first != second
    assert before != after
    for source, revision, commit, digest in (
        ("ann/run", None, second, after),
        ("ann/run", first, first, before),
        ("ann/run", "v1", first, before),
        ("ann/run@v1", None, first, before),
        (f"ann/run@{second}", second, second, after),
    ):
        loaded = fastadapt.load(source, revision=revision)
        assert loaded.commit == commit
        assert adapter_digest(loaded.models.folder("run")) == digest
    assert push(run, "ann/run").commit == second  # nothing changed
    with pytest.raises(UserError, match=r"expected that of ann/run@v1, got 'main'"):
        fastadapt.load("ann/run@v1", revision="main")


def test_what_an_earlier_run_alone_has_is_removed(hub: FakeHub, run: Path, tmp_path: Path) -> None:
    push(run, "ann/run")
    push(shutil.copytree(run / "adapter", tmp_path / "bare"), "ann/run")
    files = {".gitattributes", "README.md", *(f"adapter/{name}" for name in ADAPTERS)}
    assert set(hub.repositories["ann/run"].files) == files
    assert fastadapt.load("ann/run").config is None


@pytest.mark.parametrize("kind", ["ablate", "only", "onto-target"])
def test_a_pushed_intervention_is_loaded(
    kind: Any, hub: FakeHub, run: Path, tmp_path: Path
) -> None:
    """It records pair and data only."""
    output = intervene(run, tmp_path / kind, named_features(run, ["0/1"]), Intervention(kind))
    push(output, "ann/changed")
    loaded = fastadapt.load("ann/changed", device="cpu")
    assert loaded.config is None
    assert f"{kind} set (1)" in repr(loaded)
    assert adapter_digest(loaded.models.folder("run")) == adapter_digest(output / "adapter")


# --- names of models ------------------------------------------------------------------------------


@pytest.fixture
def local_run(run: Path, save_model: Callable[..., str]) -> tuple[Path, str, str]:
    """A run whose pair are folders of this machine; and the folders."""
    target, base = save_model("target", 0), save_model("base", 1)
    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["pair"] |= {"target": target, "base": base}
    path.write_text(yaml.safe_dump(config))
    path = run / "adapter" / CARD
    card = json.loads(path.read_text())
    card["metadata"] |= {"target": target, "base": base}
    path.write_text(json.dumps(card))
    return run, target, base


def test_a_pair_of_local_folders_needs_names_on_the_hub(
    hub: FakeHub, local_run: tuple[Path, str, str]
) -> None:
    run, target, base = local_run
    hub.create("ann/target")
    for typed, role, folder in ((None, "target", target), ("ann/target", "base", base)):
        with pytest.raises(UserError, match=rf"the {role}, {folder}, is a folder .*--{role} OWNER"):
            push(run, "ann/run", target=typed)
    assert "ann/run" not in hub.repositories
    commits = {"target": hub.repositories["ann/target"].head, "base": hub.create("bob/base").head}
    hub.repositories["bob/base"].add({"config.json": b"{}"})
    hub.repositories["bob/base"].tags["v1"] = commits["base"]
    push(run, "ann/run", target="ann/target", base="bob/base@v1")
    files = hub.repositories["ann/run"].files
    metadata = json.loads(files[f"adapter/{CARD}"])["metadata"]
    pair = yaml.safe_load(files["config.yaml"])["pair"]
    for names in (metadata, pair):
        assert (names["target"], names["base"]) == ("ann/target", "bob/base")
    assert metadata["revisions"] == commits
    assert (pair["target_revision"], pair["base_revision"]) == (commits["target"], commits["base"])
    header = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert header["base_model"] == ["ann/target", "bob/base"]
    for content in files.values():
        assert target.encode() not in content
        assert base.encode() not in content
    assert fastadapt.load("ann/run").models.config.target_revision == commits["target"]


def test_a_name_that_was_never_on_the_hub_is_refused(hub: FakeHub, run: Path) -> None:
    """A relative path looks like a hub id; a run of a model of the hub has the model's commit."""
    path = run / "adapter" / CARD
    card = json.loads(path.read_text())
    card["metadata"] |= {"target": "models/mine"}
    path.write_text(json.dumps(card))
    with pytest.raises(UserError, match=r"the target, models/mine, .* was not read from the hub"):
        push(run / "adapter", "ann/run")
    card["metadata"]["revisions"]["target"] = "c" * 40
    path.write_text(json.dumps(card))
    push(run / "adapter", "ann/run")
    assert "models/mine" in hub.repositories["ann/run"].files["README.md"].decode()
    for name in ("ann/nothing", "ann/run@v9"):
        with pytest.raises(UserError, match=r"no repository of this name|no revision 'v9'"):
            push(run, "ann/run", target=name)


def test_a_path_is_never_a_name_on_the_hub(hub: FakeHub, run: Path, tmp_path: Path) -> None:
    push(run, "ann/run")
    hub.repositories["runs/run"] = hub.repositories["ann/run"]
    assert fastadapt.load("runs/run").commit is not None
    (tmp_path / "runs").mkdir()
    hub.requests.clear()
    for name in ("runs/run", "./runs/run", "runs/run@main", Path("bob/run"), "a/b/c", "run"):
        with pytest.raises(UserError, match="expected a run or a folder of adapters"):
            fastadapt.load(name)
    with pytest.raises(UserError, match="revision: expected none for the folder"):
        fastadapt.load(run, revision="main")
    assert hub.requests == []
    assert not is_local("bob/run")


# --- what only this machine has -------------------------------------------------------------------


def test_no_path_of_this_machine_is_uploaded(hub: FakeHub, run: Path) -> None:
    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    secret = f"{Path.home()}/SECRET"
    config["data"] |= {
        "train": [{"source": "/home/SECRET/a.jsonl"}, {"source": "file:///home/SECRET/b.jsonl"}],
        "validation": "../../SECRET/v.jsonl",
        "columns": {"/home/SECRET/column": "text"},
        "cache": "C:\\Users\\SECRET\\cache",
    }
    path.write_text(yaml.safe_dump(config))
    path = run / "adapter" / CARD
    card = json.loads(path.read_text())
    words = "promotes wait and/or 3/4, of /home/SECRET/x.json | ~/SECRET/y.json"
    card["metadata"] |= {
        "interventions": [
            {
                "kind": "ablate",
                "set": {"name": "/home/SECRET/hesitation", "made": words, "size": 3},
                "sha256": "0" * 64,
                "run": "~/SECRET/run",
                "adapter": "0" * 64,
            }
        ],
        "note": f"trained on (/home/SECRET/y), then {secret}/z of https://example.org/a/b",
        "versions": {"torch": f"2.13 from {secret}/torch"},
        "family": {"user": ["/u ", "[/INST]"], "assistant": ["</think>", "/think /no_think"]},
    }
    path.write_text(json.dumps(card))
    push(run, "ann/run")
    files = hub.repositories["ann/run"].files
    for name, content in files.items():
        assert b"SECRET" not in content, name
    metadata = json.loads(files[f"adapter/{CARD}"])["metadata"]
    assert metadata["family"] == card["metadata"]["family"]
    assert metadata["note"] == "trained on (y), then z of https://example.org/a/b"
    (step,) = metadata["interventions"]
    assert step["set"]["made"] == "promotes wait and/or 3/4, of x.json | y.json"
    assert yaml.safe_load(files["config.yaml"])["data"]["columns"] == {"column": "text"}
    shown = files["README.md"].decode()
    for text in ("ablate hesitation (3)", "| a.jsonl, b.jsonl |", "| v.jsonl |", "2.13 from torch"):
        assert text in shown


@pytest.mark.parametrize(
    "family", [{"template": "/home/SECRET/t.jinja"}, {"user": ["a", "../x"]}, "file:///home/a/b"]
)
def test_a_chat_format_with_a_path_is_refused(family: Any, hub: FakeHub, run: Path) -> None:
    path = run / "adapter" / CARD
    card = json.loads(path.read_text())
    card["metadata"]["family"] = family
    path.write_text(json.dumps(card))
    with pytest.raises(UserError, match="family: expected a chat format without paths"):
        push(run, "ann/run")
    assert "ann/run" not in hub.repositories


@pytest.mark.parametrize("place", ["home", "run"])
def test_the_home_folder_is_in_no_upload(
    place: str, hub: FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A form that is not rewritten, a folder's name inside another text, is refused."""
    monkeypatch.setenv("HOME", "/home/ann")
    folder = {"home": "/home/ann", "run": str(run)}[place]
    path = run / "adapter" / CARD
    card = json.loads(path.read_text())
    card["metadata"]["family"] = {"user": [f"<{folder}>", "b"], "assistant": ["c", "d"]}
    path.write_text(json.dumps(card))
    expected = "family" if place == "run" else r"nothing was uploaded: adapter/fastadapt.json would"
    with pytest.raises(UserError, match=expected):
        push(run, "ann/run")
    assert "ann/run" not in hub.repositories


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_private_run_needs_a_token(
    hub: FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(run, "ann/secret", private=True)
    assert hub.repositories["ann/secret"].private
    for token in ("", "hf_bob"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(
            UserError, match=r"ann/secret: no such folder, and no repository .* or a private one"
        ):
            fastadapt.load("ann/secret")
    monkeypatch.setenv("HF_TOKEN", "hf_ann")
    assert fastadapt.load("ann/secret").commit == hub.repositories["ann/secret"].head


def test_what_the_hub_does_not_have_is_named(hub: FakeHub, run: Path) -> None:
    push(run, "ann/run")
    hub.create("ann/model", {"model.safetensors": b"x"})
    for source, message in (
        (
            "ann/nothing",
            "ann/nothing: no such folder, and no repository of this name on http://127.0.0.1",
        ),
        ("ann/run@v9", "ann/run has no revision 'v9'; give a branch, tag or commit"),
        (f"ann/run@{'a' * 40}", "ann/run has no revision 'aaaa"),
        ("ann/model", "ann/model: expected a run .* without adapter/fastadapt.json"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            fastadapt.load(source)
        assert "\n" not in str(caught.value)


def test_a_push_without_the_right_to_write_is_refused(
    hub: FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.create("bob/run")
    hub.create("ann/model", {"model.safetensors": b"x"})
    hub.create("ann/public")
    for token, name, private, message in (
        ("hf_ann", "bob/run", None, "bob/run: your token may not write there"),
        ("hf_ann", "bob/new", None, "bob/new: your token may not write there"),
        ("", "ann/new", None, r"ann/new: .* does not know your token; log in"),
        ("hf_wrong", "ann/new", None, r"ann/new: .* does not know your token; log in"),
        ("hf_ann", "ann/model", None, r"holds files that are not a run's \(model.safetensors\)"),
        ("hf_ann", "ann/public", True, "ann/public is public; nothing was uploaded"),
        ("hf_ann", "run", None, "expected a repository as OWNER/NAME, got 'run'"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(UserError, match=message) as caught:
            push(run, name, private=private)
        assert "\n" not in str(caught.value)
    assert all(len(each.commits) == 1 for each in hub.repositories.values())
    with pytest.raises(UserError, match=r"license: expected a name such as apache-2.0"):
        push(run, "ann/run", license="MIT or so")


def test_weights_of_the_model_itself_are_not_pushed(hub: FakeHub, run: Path) -> None:
    path = run / "adapter" / CARD
    path.write_text(json.dumps({**json.loads(path.read_text()), "kind": "mlp", "additive": False}))
    with pytest.raises(UserError, match=r"needs transcoder adapters; the folder holds .*'mlp'"):
        push(run, "ann/run")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("part", "fault"),
    [
        ("commit", "drop"),
        ("commit", 500),
        ("blobs", 400),
        pytest.param("blobs", "drop", marks=pytest.mark.slow),  # the client tries for 23 s
    ],
)
def test_an_interrupted_upload_changes_nothing(
    part: str, fault: str | int, hub: FakeHub, run: Path
) -> None:
    first = push(run, "ann/run").commit
    before = adapter_digest(run / "adapter")
    change(run)
    hub.fault = lambda method, path: fault if f"/{part}/" in path else None
    with pytest.raises(RunError, match="ann/run: the upload was interrupted") as caught:
        push(run, "ann/run")
    assert "\n" not in str(caught.value)
    hub.fault = lambda method, path: None
    loaded = fastadapt.load("ann/run")
    assert (loaded.commit, adapter_digest(loaded.models.folder("run"))) == (first, before)
    second = push(run, "ann/run").commit
    assert fastadapt.load("ann/run").commit == second != first


def test_a_hub_out_of_reach_leaves_the_cache(hub: FakeHub, run: Path) -> None:
    commit = push(run, "ann/run").commit
    fastadapt.load("ann/run")
    hub.fault = lambda method, path: "drop"
    with pytest.raises(RunError, match=r"ann/run: .* Run the same command again"):
        fastadapt.load("ann/run")
    hub.shutdown()
    hub.server_close()
    huggingface_hub.close_session()  # a connection that is open would still be answered
    for name in ("ann/run", f"ann/run@{commit}"):
        assert fastadapt.load(name).commit == commit
    start = time.monotonic()
    for name in ("ann/other", f"ann/other@{'a' * 40}"):
        with pytest.raises(
            UserError, match=r"ann/other: no such folder, .* cannot be reached, and the hub's cache"
        ):
            fastadapt.load(name)
    assert time.monotonic() - start < 10  # the client itself tries a commit for 23 s


@pytest.mark.slow
def test_the_hub_is_that_of_the_environment(run: Path, tmp_path: Path) -> None:
    code = (
        "import sys, fastadapt; from fastadapt.cli.main import main; "
        "assert main(['push', sys.argv[1], 'ann/run']) == 0; "
        "print(fastadapt.load('ann/run').commit)"
    )
    with serving() as server:
        environment: dict[str, Any] = {
            **os.environ,
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_ann",
        }
        done = subprocess.run(
            [sys.executable, "-c", code, str(run)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == server.repositories["ann/run"].head


def test_a_home_folder_inside_a_name_is_part_of_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/root")
    names = ["acme/root-7b", "acme/rootbeer", "https://a.org/root/b", "a/root", "ann/root.b"]
    assert portable(names) == names
    paths = ["/root/held out.jsonl", "see /root.", "in (/root)", "/root-7b/a", "~/root/b"]
    assert portable(paths) == ["held out.jsonl", "see ~.", "in (~)", "a", "b"]
    assert portable("/root") == "~"


@pytest.mark.parametrize("before", ["see\\n", "see\\t", "-I", "cc -I", "cc '-I"])
def test_a_home_folder_after_an_escaped_newline_or_an_option(
    before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    text = f"{before}/home/ann/x"
    assert portable(text) == f"{before}~/x"
    for content in (text, json.dumps(text), json.dumps({"log": f"see\n/home/ann/{before}"})):
        with pytest.raises(UserError, match="would name /home/ann, a folder of this machine"):
            check_private({"log.txt": content.encode()}, "run")
    for other in ("acme-I/home/ann/x", "a/-I/home/ann/x"):
        assert portable(other) == other
        check_private({"log.txt": other.encode()}, "run")
