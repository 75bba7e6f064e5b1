"""Command `fastadapt graph`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from fastadapt.cli.console import print_table
from fastadapt.graphs.evidence import EvidenceConfig
from fastadapt.graphs.explain import Question
from fastadapt.graphs.graph import GraphConfig
from fastadapt.graphs.trace import Stream

if TYPE_CHECKING:
    from fastadapt.graphs.files import GraphFile
    from fastadapt.graphs.graph import Graph

_SHOWN = 12  # edges in the table
_PATHS = 5
_LEAST = 0.05  # share of an edge from which a head is named


def graph(
    run: str,
    prompt: str,
    *,
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
    most.

    Args:
        run: folder of a finished run
        prompt: the text, with the markers that the model expects
        token: explain the logit of this token
        against: with --token: explain the difference to the logit of this token
        feature: explain the pre-activation of this feature, as layer/number
        direction: explain a direction of the last state: a safetensors file with a tensor
            `direction`
        position: index of the token to explain; by default the last
        stream: replacement, or target with what the adapters miss as error nodes
        output: file to write; by default in graphs in the run
        dtype: float32 or float64
        overwrite: replace the file
    """
    from fastadapt.cli.progress import stoppable
    from fastadapt.errors import UserError
    from fastadapt.graphs.explain import explain
    from fastadapt.graphs.files import write_graph
    from fastadapt.io.names import typed_path

    question = Question(token, against, feature, direction, position)
    settings = json.dumps([prompt, stream, dtype, vars(question), vars(config)], sort_keys=True)
    name = f"{hashlib.sha256(settings.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}.json"
    folder = typed_path(run, "run")
    path = folder / "graphs" / name if output is None else typed_path(output, "--output")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists. Replace it (--overwrite), or give another --output")
    with stoppable() as (_, progress):
        result, document = explain(
            run,
            prompt,
            question,
            config,
            evidence,
            stream=stream,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=lambda done, n: progress("features", done, n),
        )
    write_graph(document, path, overwrite=overwrite)
    _print(result, document, path)
    return 0


def _print(graph: Graph, document: GraphFile, path: Path) -> None:
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
        rows.append([_name(document, node), number(weight), through or "–"])
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
    names = {leaf: _leaf_name(graph, document, leaf) for _, p in graph.paths(_PATHS) for leaf in p}
    paths = [
        [" -> ".join([*(names[leaf] for leaf in reversed(path)), "target"]), percent(strength)]
        for strength, path in graph.paths(_PATHS)
    ]
    print_table(["path", "strength"], paths)
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
    columns = ("ablated", "ablated_random", "isolated", "isolated_random")
    print()
    print_table(
        ["features", "ablated", "random", "only these", "random"],
        [
            [str(n), *(percent(curve[name][i]) for name in columns)]
            for i, n in enumerate(curve["n"])
        ],
    )
    print(f"\nLater adapters undo {percent(evidence['returned'])} of the ablations' effects.")


def _leaf_name(graph: Graph, document: GraphFile, leaf: int) -> str:
    from fastadapt.graphs.attribution import KINDS

    leaves = graph.leaves
    kind, layer, position = KINDS[int(leaves.kind[leaf])], leaves.layer[leaf], leaves.position[leaf]
    return _label(document, kind, int(layer), int(position), int(leaves.feature[leaf]))


def _name(document: GraphFile, i: int) -> str:
    node = document["nodes"][i]
    return _label(document, node["kind"], node["layer"], node["position"], node["feature"])


def _label(document: GraphFile, kind: str, layer: int, position: int, feature: int) -> str:
    place = f"{document['tokens'][position]!r}@{position}"
    if kind == "token":
        return f"token {place}"
    unit = f"feature {layer}/{feature}" if kind == "feature" else f"{kind} {layer}"
    return f"{unit} {place}"
