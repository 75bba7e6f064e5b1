"""Command `fastadapt graph`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fastadapt.cli.console import print_table
from fastadapt.graphs.evidence import EvidenceConfig
from fastadapt.graphs.explain import Question
from fastadapt.graphs.graph import GraphConfig
from fastadapt.graphs.trace import Stream

if TYPE_CHECKING:
    from fastadapt.evaluation.models_under_test import ModelSet
    from fastadapt.graphs.files import GraphFile
    from fastadapt.graphs.graph import Graph
    from fastadapt.graphs.places import Place, PlaceConfig

GRAPHS = "graphs"  # folder in the run
_SHOWN = 12  # edges in the table
_PATHS = 5
_LEAST = 0.05  # share of an edge from which a head is named


def graph(
    run: str,
    prompt: str | None = None,
    *,
    prompts: str | None = None,
    responses: str | None = None,
    at: tuple[str, ...] = (),
    above: float | None = None,
    after: str | None = None,
    place: tuple[str, ...] = (),
    token: str | None = None,
    against: str | None = None,
    feature: str | None = None,
    direction: str | None = None,
    position: int | None = None,
    stream: Stream = "replacement",
    output: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    config: GraphConfig,
    evidence: EvidenceConfig,
) -> int:
    """Explain a prediction of a run's replacement model: which tokens, features and biases it came
    from, how much of the difference to the hybrid each part gives, and whether ablations agree. By
    default the target's most likely token is explained against the hybrid's, where both differ
    most. `fastadapt graph serve` and `fastadapt graph export` show the graphs.

    Args:
        run: folder of a finished run
        prompt: the text, with the markers that the model expects
        prompts: folder of prompts, one .txt file each; graphs that exist are skipped
        responses: file of sampled responses: list the places that --at describes
        at: with --responses: words; list places where one of them is the most likely token
        above: with --at: list places where the words' probability rises to this value instead
        after: with --at: only places after this text in the response, such as `the answer is`
        place: with --at: numbers of places to explain, or `all`; graphs that exist are skipped
        token: explain the logit of this token
        against: with --token or --place: explain the difference to the logit of this token
        feature: explain the pre-activation of this feature, as layer/number
        direction: explain a direction of the last state: a safetensors file with a tensor
            `direction`
        position: index of the token to explain; by default the last
        stream: replacement, or target with what the adapters miss as error nodes
        output: file to write; for several graphs, a folder; by default graphs in the run
        dtype: float32 or float64
        overwrite: replace files that exist
    """
    from fastadapt.errors import UserError
    from fastadapt.graphs.places import PlaceConfig
    from fastadapt.io.names import typed_path

    sources = {"PROMPT": prompt, "--prompts": prompts, "--responses": responses}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        raise UserError(f"expected one of {', '.join(sources)}, got {', '.join(given) or 'none'}")
    if responses is None and (at or place or above is not None or after is not None):
        raise UserError("--at: expected with --responses, a file of sampled responses")
    if responses is not None and (token, feature, direction, position) != (None,) * 4:
        raise UserError(
            "--token: a place gives the token and its position; leave out --token, --feature, "
            "--direction and --position"
        )
    contrast = against if responses is None else None
    question = Question(token, contrast, feature, direction, position)
    work = _Work(run, stream, config, evidence, dtype, device, trust_remote_code, overwrite)
    folder = typed_path(run, "run") / GRAPHS if output is None else typed_path(output, "--output")
    if prompt is not None:
        path = folder if output is not None else folder / work.name(prompt, question)
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists. Replace it (--overwrite), or give another --output")
        work.explain(prompt, question, path)
    elif prompts is not None:
        for text in _prompts(typed_path(prompts, "--prompts")):
            work.explain_new(text, question, folder)
    else:
        places = work.list_places(str(responses), PlaceConfig(at, above, after))
        for spot in _pick(places, place):
            work.explain_new(spot.ids, Question(spot.token, against), folder)
    if work.stopped:
        print("Stopped; finished graphs are saved. Run the same command again to go on.")
    return 0


@dataclass
class _Work:
    """The settings of a call, and the run once it is loaded."""

    run: str
    stream: Stream
    config: GraphConfig
    evidence: EvidenceConfig
    dtype: str
    device: str | None
    trust_remote_code: bool
    overwrite: bool
    stopped: bool = False  # by a signal: no further graph is begun

    @cached_property
    def models(self) -> ModelSet:
        from fastadapt.graphs.explain import open_models

        return open_models(
            self.run,
            dtype=self.dtype,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
        )

    def name(self, text: str | Sequence[int], question: Question) -> str:
        """Return the name of a graph's file, which is that of its settings."""
        settings = [text, self.stream, self.dtype, vars(question), vars(self.config)]
        packed = json.dumps(settings, sort_keys=True).encode("utf-8", "surrogatepass")
        return f"{hashlib.sha256(packed).hexdigest()[:12]}.json"

    def explain_new(self, text: str | Sequence[int], question: Question, folder: Path) -> None:
        """Explain a text unless its graph exists."""
        path = folder / self.name(text, question)
        if self.stopped:
            return
        if path.exists() and not self.overwrite:
            print(f"exists: {path.resolve()}")
        else:
            self.explain(text, question, path)

    def explain(self, text: str | Sequence[int], question: Question, path: Path) -> None:
        from fastadapt.cli.progress import stoppable
        from fastadapt.graphs.explain import explain
        from fastadapt.graphs.files import write_graph

        with stoppable() as (stop, progress):
            result, document = explain(
                self.models,
                text,
                question,
                self.config,
                self.evidence,
                stream=self.stream,
                progress=lambda done, n: progress("features", done, n),
            )
        self.stopped = stop.is_set()
        write_graph(document, path, overwrite=self.overwrite)
        _print(result, document, path, _labels(Path(self.run), document))

    def list_places(self, responses: str, config: PlaceConfig) -> list[Place]:
        """Print and return the places of sampled responses."""
        from fastadapt.cli.progress import stoppable
        from fastadapt.evaluation.generation.responses import read_responses
        from fastadapt.features.store.characters import visible
        from fastadapt.graphs.places import find_places
        from fastadapt.io.names import typed_path
        from fastadapt.reporting.formatting import number

        read = read_responses(typed_path(responses, "--responses"))
        model = self.models.model
        with stoppable() as (stop, progress):
            places = find_places(
                model,
                read,
                config,
                stream=self.stream,
                progress=lambda done, n: progress("responses", done, n),
                stop=stop,
            )
        self.stopped = stop.is_set()
        rows = []
        for i, p in enumerate(places):
            cells = (f"{p.id} {p.repetition}", str(p.position), number(p.probability, 2))
            rows.append([str(i), *cells, visible(p.before)])
        print_table(["place", "response", "position", "p", "text before"], rows, left=True)
        print(f"\n{len(places):,} places in {len(read):,} responses. Explain some: --place 0 1")
        return places


def _prompts(folder: Path) -> list[str]:
    """Return the texts of the ``.txt`` files of a folder, in the order of their names."""
    from fastadapt.errors import UserError
    from fastadapt.io.documents import read_text

    files = sorted(folder.glob("*.txt"))
    if not files:
        raise UserError(f"--prompts: expected a folder with .txt files, got {folder}")
    return [read_text(file).rstrip("\n") for file in files]


def _pick(places: Sequence[Place], numbers: Sequence[str]) -> list[Place]:
    from fastadapt.errors import UserError

    if list(numbers) == ["all"]:
        return list(places)
    wrong = [n for n in numbers if not (n.isascii() and n.isdigit() and int(n) < len(places))]
    if wrong:
        raise UserError(
            f"--place: expected numbers from 0 to {len(places) - 1}, or all, got {' '.join(wrong)}"
        )
    return [places[int(n)] for n in numbers]


def _labels(run: Path, document: GraphFile) -> dict[tuple[int, int], str]:
    """Return texts of the graph's features from the store of the run, none without one."""
    from fastadapt.errors import UserError
    from fastadapt.graphs.labels import feature_labels, store_of, units_of

    try:
        store = store_of(run, document)
    except UserError as error:
        print(f"Features are shown without their texts: {error}\n")
        return {}
    return {} if store is None else feature_labels(store, units_of(document))


def _print(
    graph: Graph, document: GraphFile, path: Path, labels: dict[tuple[int, int], str]
) -> None:
    from fastadapt.graphs.labels import node_name, path_in_words, strongest_paths
    from fastadapt.reporting.formatting import number, percent

    row = document["rows"][0]
    after = document["tokens"][row["position"]]
    print(f"{row['name']} after {after!r} (position {row['position']}): {number(row['value'])}\n")
    heads = {edge["node"]: edge for edge in document["heads"]}
    rows = []
    for node, weight in list(zip(row["sources"], row["weights"], strict=True))[:_SHOWN]:
        edge = heads.get(node)
        loads = sorted(edge["heads"], key=lambda h: -abs(h[2]))[:2] if edge else []
        loads = [load for load in loads if abs(load[2]) >= _LEAST * abs(weight)]
        through = ", ".join(
            f"{layer}.{head} {percent(part / weight)}" for layer, head, part in loads
        )
        rows.append([node_name(document, node), number(weight), through or "–"])
    print_table(["from", "edge", "through heads"], rows)
    print()
    _print_account(document)
    flow = document["flow"]
    print(
        f"\nreplacement {percent(flow['replacement'])}, completeness "
        f"{percent(flow['completeness'])}; influence ends at tokens {percent(flow['tokens'])}, "
        f"biases {percent(flow['biases'])}, errors {percent(flow['errors'])}, pruned "
        f"{percent(flow['pruned'])}; position 0 gives "
        f"{percent(row['first_position'] / row['size'] if row['size'] else 0)} of the edges\n"
    )
    print("strongest paths, with their share of the influence:")
    for strength, nodes in strongest_paths(graph, document, _PATHS):
        print(f"  {percent(abs(strength))}: {path_in_words(document, nodes, labels)}")
    _print_evidence(document)
    print(f"\ngraph: {path.resolve()}")


def _print_account(document: GraphFile) -> None:
    from fastadapt.reporting.formatting import number

    account = document["account"]
    labels = {
        "with_adapters": f"value in the {document['stream']}",
        "hybrid": "value in the hybrid",
        "features": "difference: features",
        "decoder_biases": "difference: adapters' biases",
        "errors": "difference: errors",
        "coefficients": "difference: patterns, gates, norms",
        "remainder": "difference: rounding",
    }
    print_table(["quantity", "value"], [[labels[k], number(v)] for k, v in account.items()])


def _print_evidence(document: GraphFile) -> None:
    from fastadapt.reporting.formatting import number, percent

    evidence = document.get("evidence")
    if evidence is None:
        return
    rows = []
    for sample in evidence["samples"]:
        for line in sample["correlations"]:
            cells = [
                f"{number(mean, 2)} [{number(low, 2)}, {number(high, 2)}]"
                for mean, low, high in (line["spearman"], line["pearson"])
            ]
            rows.append([f"{len(sample['nodes'])} {sample['name']}", line["predictor"], *cells])
    print()
    print_table(["ablated features", "predicted by", "Spearman", "Pearson"], rows)
    curve = evidence["curve"]
    columns = (
        curve["ablated"],
        curve["ablated_random"],
        curve["isolated"],
        curve["isolated_random"],
    )
    print()
    print_table(
        ["features", "ablated", "random", "only these", "random"],
        [[str(n), *(percent(column[i]) for column in columns)] for i, n in enumerate(curve["n"])],
    )
    print(f"\nLater adapters undo {percent(evidence['returned'])} of the ablations' effects.")
