"""Rows of every kind of source, and one error message for each source that cannot be read."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastadapt.data.formats import read_files
from fastadapt.data.hub import reading_hub
from fastadapt.data.sources import Source, find_files, read_values
from fastadapt.errors import UserError


@pytest.fixture
def rows(turns: Callable[[str, str], list[dict[str, str]]]) -> list[list[dict[str, str]]]:
    return [turns(f"{i} + 1 ?", f"<think> so {i} </think> {i + 1}") for i in range(5)]


def read(source: str | Path, split: str = "train") -> list[Any]:
    rows = read_values(Source(str(source), split), ["conversations"])
    return [row["conversations"] for _, row in rows]


def write_parquet(path: Path, columns: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def test_jsonl_and_parquet_hold_the_same_rows(
    rows: list[list[dict[str, str]]], write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    parquet = write_parquet(tmp_path / "rows.parquet", {"conversations": rows})
    assert read(write_jsonl(rows)) == read(parquet) == rows


def test_other_columns_are_ignored(rows: list[list[dict[str, str]]], tmp_path: Path) -> None:
    line = {"difficulty": None, "source": "s", "domain": "math", "conversations": rows[0]}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(line))
    parquet = write_parquet(
        tmp_path / "rows.parquet", {"difficulty": [None], "conversations": rows[:1]}
    )
    assert read(path) == read(parquet) == rows[:1]


def test_blank_lines_and_a_byte_order_mark_are_no_rows(
    rows: list[list[dict[str, str]]], write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    plain = Path(write_jsonl(rows)).read_text()
    path = tmp_path / "marked.jsonl"
    path.write_text("\ufeff" + plain.replace("\n", "\r\n\r\n"), encoding="utf-8")
    assert read(path) == rows


def test_a_line_separator_within_a_value_does_not_end_the_row(
    turns: Callable[[str, str], list[dict[str, str]]], write_jsonl: Callable[..., str]
) -> None:
    rows = [turns("a\u2028b", "c\u0085d")]
    assert read(write_jsonl(rows)) == rows


def test_a_folder_is_read_in_the_order_of_its_paths(
    rows: list[list[dict[str, str]]], write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    write_jsonl(rows[2:], "b.jsonl")
    write_parquet(tmp_path / "a" / "0.parquet", {"conversations": rows[:2]})
    write_jsonl(rows, ".cache/hidden.jsonl")
    (tmp_path / "README.md").write_text("not data")
    assert read(tmp_path) == rows


def test_a_folder_named_after_splits_gives_the_split(
    rows: list[list[dict[str, str]]], write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    write_jsonl(rows[:1], "data/train-00000-of-00002.jsonl")
    write_jsonl(rows[1:3], "data/train-00001-of-00002.jsonl")
    write_jsonl(rows[3:], "data/validation.jsonl")
    assert read(tmp_path, "train") == rows[:3]
    assert read(tmp_path, "validation") == rows[3:]
    with pytest.raises(UserError, match="no file of split 'test' among data/train-00000"):
        read(tmp_path, "test")


FOLDERS = {
    "folders": ({"train": ["train/a.jsonl"], "validation": ["validation/a.jsonl"]}, None),
    "folders of a source": ({"train": ["math/train/a.jsonl"], "test": ["math/test/a.jsonl"]}, None),
    "the nearest folder": ({"train": ["dev/train/a.jsonl"], "test": ["dev/test/a.jsonl"]}, None),
    "words in folders": ({"train": ["train_data/a.jsonl"], "dev": ["val_data/a.jsonl"]}, None),
    "a folder, not its files": ({"validation": ["train/a.jsonl"]}, "splits are train; choose one"),
    "words in names": ({"train": ["a-train.jsonl"], "validation": ["a-validation.jsonl"]}, None),
    "synonyms": ({"train": ["training.jsonl"], "validation": ["val.jsonl"]}, None),
    "other synonyms": ({"train": ["Train_1.jsonl"], "test": ["eval1.jsonl", "eval2.jsonl"]}, None),
    "the name itself first": ({"test": ["test.jsonl"], "eval": ["eval.jsonl"]}, None),
    "the first word": ({"train": ["train_on_test.jsonl"], "test": ["test.jsonl"]}, None),
    "no split": ({"train": ["a.jsonl", "latest/trainer.jsonl", "x-00000-of-00001.jsonl"]}, None),
    "shards": (
        {
            "train_sft": ["train_sft-00000-of-00002.jsonl", "train_sft-00001-of-00002.jsonl"],
            "train_gen": ["train_gen-00000-of-00001.jsonl"],
            "test_sft": ["test_sft-00000-of-00001-6ef3991c0608.jsonl"],
        },
        None,
    ),
    "a part of a shard's split": (
        {"train": ["train_sft-00000-of-00001.jsonl", "train_gen-00000-of-00001.jsonl"]},
        "no file of split 'train' among .*; the splits are train_gen, train_sft; choose one with",
    ),
    "splits of other names": ({"fold1": ["fold1-a.jsonl"], "fold10": ["fold10.jsonl"]}, None),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_files_and_folders_name_splits(
    case: str,
    rows: list[list[dict[str, str]]],
    write_jsonl: Callable[..., str],
    tmp_path: Path,
) -> None:
    splits, message = FOLDERS[case]
    for names in splits.values():
        for name in names:
            write_jsonl(rows, name)
    for split, names in splits.items():
        if message is not None:
            with pytest.raises(UserError, match=message):
                find_files(str(tmp_path), split)
            continue
        files = find_files(str(tmp_path), split)
        assert files is not None
        assert sorted(path.relative_to(tmp_path).as_posix() for path in files) == sorted(names)


@pytest.mark.parametrize("group", [1, 3, 100])
def test_files_are_read_on_from_any_row(
    group: int, turns: Callable[[str, str], list[dict[str, str]]], tmp_path: Path
) -> None:
    """Reading from a cursor gives the remaining rows with the same locations."""
    rows = [turns(f"{i} + 1 ?", f"{i}") for i in range(11)]
    paths = [tmp_path / name for name in ("a.jsonl", "b.parquet", "c.parquet", "d.jsonl")]
    lines = [json.dumps({"n": i, "conversations": row}) for i, row in enumerate(rows)]
    paths[0].write_text("\ufeff" + "\n\n".join(lines), encoding="utf-8")
    paths[3].write_text("\n" + "\n".join(lines) + "\n\n", encoding="utf-8")
    table = pa.table({"n": range(11), "conversations": rows})
    pq.write_table(table, paths[1], row_group_size=group)
    pq.write_table(table.slice(0, 0), paths[2])
    whole = list(read_files(paths, ["conversations"], ["n"]))
    assert [record.values["n"] for record in whole] == [*range(11)] * 3
    for i, record in enumerate(whole):
        assert (
            list(read_files(paths, ["conversations"], ["n"], start=record.after)) == whole[i + 1 :]
        )


def test_folders_behind_links_are_read_each_once(
    rows: list[list[dict[str, str]]], write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    folder, disk = tmp_path / "set", tmp_path / "disk"
    write_jsonl(rows[:1], "set/a.jsonl")
    write_jsonl(rows[1:3], "disk/deep/b.jsonl")
    write_jsonl(rows, "disk/.hidden/c.jsonl")
    (folder / "more").symlink_to(disk)
    assert read(folder) == rows[:3]
    (disk / "deep" / "back").symlink_to(folder)  # a circle
    (folder / "again").symlink_to(disk / "deep")  # the same folder by another name
    (folder / ".cache").symlink_to(disk)
    assert sorted(map(str, read(folder))) == sorted(map(str, rows[:3]))


@pytest.mark.parametrize("name", ["more", "b.jsonl"])
def test_a_link_that_leads_nowhere_is_told(
    name: str, rows: list[list[dict[str, str]]], write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    write_jsonl(rows, "set/a.jsonl")
    (tmp_path / "set" / name).symlink_to(tmp_path / "unmounted")
    with pytest.raises(UserError, match=rf"{name} is a link to .*unmounted, which is missing"):
        read(tmp_path / "set")


def test_parts_in_a_folder_that_is_called_as_a_file(
    rows: list[list[dict[str, str]]], tmp_path: Path
) -> None:
    write_parquet(tmp_path / "set.parquet" / "part-0.parquet", {"conversations": rows[:2]})
    write_parquet(tmp_path / "set.parquet" / "part-1.parquet", {"conversations": rows[2:]})
    assert read(tmp_path) == read(tmp_path / "set.parquet") == rows


def test_parts_in_folders_that_are_called_as_splits(
    rows: list[list[dict[str, str]]], tmp_path: Path
) -> None:
    write_parquet(tmp_path / "train.parquet" / "part-0.parquet", {"conversations": rows[:2]})
    write_parquet(tmp_path / "test.parquet" / "part-0.parquet", {"conversations": rows[2:]})
    assert read(tmp_path, "train") == rows[:2]
    assert read(tmp_path, "test") == rows[2:]


def test_rows_say_where_they_stand(
    rows: list[list[dict[str, str]]], write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    path = write_jsonl(rows)
    assert [where for where, _ in read_values(Source(path))][:2] == [
        f"{path}, line 1",
        f"{path}, line 2",
    ]
    parquet = write_parquet(tmp_path / "rows.parquet", {"conversations": rows})
    assert [where for where, _ in read_values(Source(str(parquet)))][-1].endswith("row 5")


def test_a_hub_dataset_is_loaded_with_its_split_and_revision(
    rows: list[list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    arguments: dict[str, Any] = {}

    def load_dataset(name: str, *, split: str, revision: str) -> Any:
        arguments.update(name=name, split=split, revision=revision)
        return datasets.Dataset.from_dict({"domain": ["math"] * 5, "conversations": rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source("someone/rows", "train[:5]", "abc")
    loaded = list(read_values(source, ["conversations"]))
    assert arguments == {"name": "someone/rows", "split": "train[:5]", "revision": "abc"}
    assert [row for _, row in loaded] == [{"conversations": row} for row in rows]
    assert loaded[3][0] == "someone/rows (train[:5]), row 3"


def test_a_hub_dataset_without_the_column_names_those_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    table = datasets.Dataset.from_dict({"prompt": ["a"], "answer": ["b"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    with pytest.raises(UserError, match="no column 'conversations'; the columns are 'prompt', 'a"):
        read("someone/rows")


def test_a_cached_hub_dataset_is_the_named_commit(
    cached_dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, ``datasets`` loads whatever its cache holds."""
    import datasets

    held, other = "a" * 40, "b" * 40
    cached_dataset("some/rows", held, [{"text": "one"}])
    read = [row for _, row in read_values(Source("some/rows", revision=held), ["text"])]
    assert read == [{"text": "one"}]
    message = f"expected revision {other}, and the cache of datasets holds {held}"
    with pytest.raises(UserError, match=message):
        list(read_values(Source("some/rows", revision=other)))
    with pytest.warns(UserWarning, match=f"commit {held} is read .* is revision 'v1'"):
        list(read_values(Source("some/rows", revision="v1")))
    monkeypatch.setattr(datasets, "load_dataset", None)  # each version is loaded once
    for revision in (held, "v1"):
        assert list(read_values(Source("some/rows", revision=revision), ["text"]))
    with pytest.raises(TypeError):
        list(read_values(Source("some/rows")))


def test_hub_datasets_that_cannot_be_loaded_say_what_to_do(
    cached_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    import datasets

    for config in ("one", "two"):
        cached_dataset("some/rows", "a" * 40, [{"text": "one"}], config)
    with pytest.raises(UserError, match=r"configs.* \['one', 'two'\]; choose one with data.subset"):
        list(read_values(Source("some/rows", subset="three")))
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set, .* Connect to the hub, or give a"):
        list(read_values(Source("some/missing")))
    # Of a dataset on the hub, the errors are those of a folder.
    several = tmp_path / "several"
    several.mkdir()
    for name in ("one", "two"):
        (several / f"{name}.jsonl").write_text('{"text": "a"}\n')
    configs = [f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("one", "two")]
    (several / "README.md").write_text("---\nconfigs:\n" + "".join(configs) + "---\n")
    with (
        pytest.raises(
            UserError, match=r"missing. .* \['one', 'two'\]; choose one with data.subset"
        ),
        reading_hub("some/several", "train", None),
    ):
        datasets.load_dataset(str(several), split="train")
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("")
    with (
        pytest.raises(UserError, match=r"script\.py\. Give the hub's copy .*refs/convert/parquet"),
        reading_hub("some/script", "train", None),
    ):
        datasets.load_dataset(str(tmp_path / "script"), split="train")


BAD_LINES = {
    "cut off": (b'{"conversations": [', "line 2: malformed JSON at column 20: Expecting value"),
    "a long integer": (b'{"a": ' + b"7" * 5000 + b"}", "line 2: malformed JSON: Exceeds the limit"),
    "deep": (b"[" * 100_000 + b"]" * 100_000, "line 2: malformed JSON: nested too deeply"),
    "a key twice": (b'{"a": 1, "a": 2}', "line 2: malformed JSON: the key 'a' occurs twice"),
    "not an object": (b"[1, 2]", "line 2: expected a JSON object, got list"),
    "other columns": (
        b'{"prompt": "a", "answer": "b"}',
        "line 2: no column 'conversations'; the columns are 'prompt', 'answer'",
    ),
    "no column": (b"{}", "line 2: no column 'conversations'; the columns are none"),
    "not UTF-8": (b'{"conversations": "\xff"}', "line 2: not UTF-8 at byte 19"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named(
    case: str, rows: list[list[dict[str, str]]], write_jsonl: Callable[..., str]
) -> None:
    line, message = BAD_LINES[case]
    path = write_jsonl(rows[:1])
    with Path(path).open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(UserError) as caught:
        read(path)
    assert f"{path}, {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


def bad_sources(folder: Path) -> dict[str, tuple[str, str]]:
    (folder / "empty").mkdir()
    (folder / "rows.xml").write_text("<a/>")
    (folder / "broken.parquet").write_bytes(b"PAR1 no parquet at all PAR1")
    write_parquet(folder / "other.parquet", {"prompt": ["a"], "answer": ["b"]})
    return {
        "no file": (f"{folder}/absent.jsonl", "absent.jsonl': no such file or folder"),
        "no file, as a name": ("absent.jsonl", "'absent.jsonl': no such file or folder"),
        "a folder without data": (
            f"{folder}/empty",
            "holds no .jsonl or .parquet file, no .csv",
        ),
        "an unknown kind": (f"{folder}/rows.xml", "expected a file of .jsonl, .parquet, .json"),
        "broken": (f"{folder}/broken.parquet", "broken.parquet cannot be read as Parquet"),
        "other columns": (
            f"{folder}/other.parquet",
            "other.parquet: no column 'conversations'; the columns are 'prompt', 'answer'",
        ),
        "not on the hub": (
            "nobody/nothing",
            "no such file or folder, and loading a dataset of this name from the hub (split "
            "'train', revision 'main') failed",
        ),
    }


@pytest.mark.parametrize(
    "case",
    [
        "no file",
        "no file, as a name",
        "a folder without data",
        "an unknown kind",
        "broken",
        "other columns",
        "not on the hub",
    ],
)
def test_a_source_that_cannot_be_read_says_why(case: str, tmp_path: Path) -> None:
    source, message = bad_sources(tmp_path)[case]
    with pytest.raises(UserError) as caught:
        read(source)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_without_permission_says_so(
    rows: list[list[dict[str, str]]],
    write_jsonl: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_jsonl(rows)

    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    # chmod does not restrict root, so the error is raised by a patch.
    monkeypatch.setattr("fastadapt.data.formats.open_regular", refuse)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        read(path)
