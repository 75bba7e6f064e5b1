"""The report is created from a run directory only, finished or not, and is safe to open."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fastadapt.reporting.formatting import number
from fastadapt.training.report import write_report

WINDOW = 100_000


def write_run(folder: Path, *, layers: int = 4, steps: int = 600, summary: bool = True) -> Path:
    """Write a run directory with the records of `steps` steps of a smoothly decaying training."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(
        f"pair:\n  target: <organism>/target\nrun:\n  seed: 42\n  dead_window: {WINDOW}\n"
    )
    edges = [-7 + 0.25 * i for i in range(29)]
    with (folder / "metrics.jsonl").open("w") as file:
        start = {
            "kind": "start",
            "step": 0,
            "steps": 600,
            "held_out_sequences": 77,
            "device": "cpu",
        }
        file.write(json.dumps(start) + "\n")
        for step in range(1, steps + 1):
            decay, wave = (
                math.exp(-step / 120),
                1 + 0.2 * math.sin(step * 1.7) * math.cos(step * 0.31),
            )
            record = {
                "kind": "train",
                "step": step,
                "loss": (4 * decay + 0.4) * wave,
                "kl": (1.9 * decay + 0.08) * wave,
                "nmse": (0.5 * decay + 0.04) * wave,
                "nmse_token": (0.6 * decay + 0.05) * wave,
                "bridge_adapter_to_target": (1.2 * decay + 0.05) * wave,
                "sparsity": (0.1 * decay + 0.02) * wave,
                "l0": 256 * decay + 2 * wave,
                "top1_error": (0.6 * decay + 0.05) * wave,
                "l0_per_layer": [(256 * decay + 1 + i) * wave for i in range(layers)],
                "dead_per_layer": [step // 40 + i for i in range(layers)],
                "lr": 8e-4 * min(1, step / 30) * 0.5 * (1 + math.cos(math.pi * step / steps)),
                "grad_norm": 0.2 + decay * wave,
                "tokens": 3000 * step,
                "tokens_per_s": 9000 + 500 * wave,
                "cutoff": step % (layers + 1),
            }
            if step % 2:
                del record["bridge_adapter_to_target"]
                record["bridge_target_to_adapter"] = (1.1 * decay + 0.06) * wave
            file.write(json.dumps(record) + "\n")
            if step % 100 == 0:
                final = {
                    "kl_hybrid": 1.93,
                    "kl_adapter": 1.9 * decay + 0.1,
                    "kl_recovered_vs_hybrid": 1 - (1.9 * decay + 0.1) / 1.93,
                    "top1_error_hybrid": 0.612,
                    "top1_error_adapter": 0.6 * decay + 0.06,
                    "nmse_mean": 0.5 * decay + 0.05,
                    "nmse_mean_hybrid": 0.44,
                    "nmse_per_layer": [0.0, *(0.02 * (i + 1) for i in range(layers))],
                    "nmse_per_layer_hybrid": [0.0, *(0.2 * (i + 1) for i in range(layers))],
                    "l0_mean": 256 * decay + 2.5,
                    "l0_per_layer": [2.0 + i for i in range(layers)],
                    "n_dead_per_layer": [7 + i for i in range(layers)],
                    "feature_density_histogram": {
                        "log10_edges": edges,
                        "counts": [
                            [round(60 * math.exp(-((e + 2.6 - 0.2 * i) ** 2))) for e in edges[:-1]]
                            for i in range(layers)
                        ],
                    },
                    "tokens": 3000 * step,
                }
                file.write(json.dumps({"kind": "eval", "step": step, **final}) + "\n")
                file.write(json.dumps({"kind": "checkpoint", "step": step, "path": "x"}) + "\n")
        file.write(json.dumps({"kind": "resume", "step": steps // 2, "skipped": []}) + "\n")
    if summary:
        versions = {"fastadapt": "0.1.0", "python": "3.11.9", "torch": "2.13.0"}
        (folder / "summary.json").write_text(
            json.dumps({**final, "wall_s": 431.7, "versions": versions})
        )
    return folder


class _Page(HTMLParser):
    """Collect tags and links, and check that all tags are closed in order."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.links: list[str | None] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("href", "src", "xlink:href")]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_report_of_a_finished_run_is_complete(tmp_path: Path) -> None:
    path = write_report(write_run(tmp_path / "run"))
    assert path == tmp_path / "run" / "report.html"
    html = path.read_text(encoding="utf-8")
    page = _Page(html)
    text = " ".join(page.text)
    for title in ("Output KL", "Top-1 error", "NMSE", "Bridge: adapter → target", "Sparsity", "L0"):
        assert f"<h3>{title}</h3>" in html
    assert "Bridge: target → adapter" in text
    assert html.count("Feature density, layer") == 4
    assert "L0 per layer over time" in text
    assert "finished" in text
    assert "NMSE after layer 3" in text
    assert "1.93" in text  # the hybrid's KL
    assert "61.2%" in text  # its top-1 error
    assert "seed: 42" in text  # the config
    assert "2.13.0" in text  # the versions
    assert "held out sequences 77" in " ".join(text.split())
    assert "dead (held-out)" in text


def _dead_in_training(folder: Path) -> tuple[str, list[str]]:
    """Return head and cells of the column of features that are dead in training."""
    rows = re.findall(r"<tr>(.*?)</tr>", write_report(folder).read_text(encoding="utf-8"))
    table = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    first = next(i for i, cells in enumerate(table) if "dead (held-out)" in cells)
    column = [cells[3] for cells in table[first : first + 5]]
    return column[0], column[1:]


@pytest.mark.quick("True")
@pytest.mark.parametrize("summary", [True, False])
def test_dead_in_training_names_its_window(tmp_path: Path, summary: bool) -> None:
    head, cells = _dead_in_training(write_run(tmp_path / "run", summary=summary))
    assert head == "dead (last 100,000 training tokens)"
    assert cells == ["15", "16", "17", "18"]  # of step 600


def test_the_window_of_a_summary_counts(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    path = run / "summary.json"
    more = {"dead_window": 1_800_000, "dead_per_layer": [5, 6, 0, 8], "tokens": 1_800_000}
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    head, cells = _dead_in_training(run)
    assert head == "dead (last 1,800,000 training tokens)"
    assert cells == ["5", "6", "0", "8"]


def test_nothing_is_dead_before_the_window_has_passed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=100)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(WINDOW), "300001"))  # 300,000 were seen
    assert _dead_in_training(run) == ("dead (last 300,001 training tokens)", ["–"] * 4)


@pytest.mark.parametrize("config", ["run:\n  seed: 42\n", "", "run: [\n", "run: 3\n", None])
def test_without_a_window_nothing_is_called_dead(tmp_path: Path, config: str | None) -> None:
    run = write_run(tmp_path / "run", steps=100)
    path = run / "config.yaml"
    if config is None:
        path.unlink()
    else:
        path.write_text(config)
    assert _dead_in_training(run) == ("dead (training, window unknown)", ["–"] * 4)


def test_the_page_needs_no_network_and_no_script(tmp_path: Path) -> None:
    html = write_report(write_run(tmp_path / "run")).read_text(encoding="utf-8")
    page = _Page(html)
    assert page.links == []
    assert {"script", "link", "iframe", "img", "object"}.isdisjoint(page.tags)
    assert not re.search(r"https?://|@import|url\(", html)


def test_the_page_survives_without_numbers_that_are_not_finite(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=100)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 101, "loss": NaN, "kl": Infinity, "l0": 0.0}\n')
    html = write_report(run).read_text(encoding="utf-8")
    drawn = "".join(re.findall(r'(?: d| x| y| transform)="[^"]*"', html))
    assert drawn
    assert "nan" not in drawn
    assert "inf" not in drawn


def test_strings_of_a_run_cannot_become_markup(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a<script>b", steps=100)
    evil = "</pre><script>alert(1)</script>"
    (run / "config.yaml").write_text(f"pair: '{evil}'\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({"kind": "bad_batch", "step": 3, "reason": evil, "ids": [evil]}) + "\n"
        )
    page = _Page(write_report(run).read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert evil in "".join(page.text)


@pytest.mark.parametrize("steps", [0, 1, 2, 99])
def test_a_run_cut_short_has_a_report_too(tmp_path: Path, steps: int) -> None:
    run = write_run(tmp_path / "run", steps=steps, summary=False)
    text = " ".join(_Page(write_report(run).read_text(encoding="utf-8")).text)
    assert "not finished" in text
    assert "No evaluation was recorded yet." in text
    assert ("No training step was recorded yet." in text) == (steps == 0)


def test_an_empty_directory_has_a_report(tmp_path: Path) -> None:
    text = " ".join(_Page(write_report(tmp_path).read_text(encoding="utf-8")).text)
    assert "No training step was recorded yet." in text


def test_half_a_line_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=100, summary=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 101, "los')
    text = " ".join(_Page(write_report(run).read_text(encoding="utf-8")).text)
    assert "not finished at step 100" in text


def test_a_step_recorded_twice_counts_once_as_recorded_last(tmp_path: Path) -> None:
    run = tmp_path
    records = [{"kind": "train", "step": s, "loss": v} for s, v in ((1, 5.0), (2, 4.0), (2, 3.0))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    html = write_report(run).read_text(encoding="utf-8")
    assert "train <b>3.00</b>" in html
    assert "not finished at step 2" in html


def test_a_sparsity_that_varies_is_drawn_and_a_missed_target_is_hinted_at(tmp_path: Path) -> None:
    records = [{"kind": "train", "step": s, "sparsity_weight": 0.1 * s} for s in (1, 2)]
    records.append({"kind": "eval", "step": 2, "l0_mean": 8.0, "sparsity_weight": 0.2})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "config.yaml").write_text("objective: {sparsity: 0.1, l0: 5.0}\n")
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<h3>λ</h3>" in html
    assert "L0 is 8.00, 60.0% above objective.l0 5.00." in html
    assert "<h3>λ</h3>" not in write_report(write_run(tmp_path / "run")).read_text(encoding="utf-8")


def test_no_directory_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run_dir: expected a run directory.*nowhere"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (1.4, "1.40"),
        (0.01234, "0.0123"),
        (1234567, "1,234,567"),
        (123456.7, "123,457"),
        (3.2e-7, "3.2e-7"),
        (-0.5, "-0.500"),
        (math.nan, "–"),
        (math.inf, "inf"),
    ],
)
def test_numbers_read_well(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.slow
def test_many_layers_are_small_multiples_with_one_colour_scale(tmp_path: Path) -> None:
    html = write_report(write_run(tmp_path / "run", layers=28, steps=100)).read_text("utf-8")
    _Page(html)
    assert html.count('viewBox="0 0 200 130"') == 28
    assert 'class="ramp"' in html
    assert "layer 27" in html
