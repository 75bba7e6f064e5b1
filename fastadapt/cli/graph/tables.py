"""Tables of `fastadapt graph`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastadapt.cli.console import print_table

if TYPE_CHECKING:
    from fastadapt.graphs.graph import Graph
    from fastadapt.graphs.schema import BaseSet, GraphFile
    from fastadapt.graphs.stability import Agreement

_SHOWN = 12  # edges in the table
_PATHS = 5
_LEAST = 0.05  # share of an edge from which a head is named


def print_base_set(base_set: BaseSet) -> None:
    """Print how much of the base's MLPs the transcoders of a set leave unexplained on a text."""
    from fastadapt.reporting.formatting import number

    rows = [[str(i), number(share)] for i, share in enumerate(base_set["unexplained_variance"])]
    print(f"base set {base_set['name']} (of {base_set['model']}), on this text:\n")
    print_table(["layer", "fraction of variance unexplained"], rows)
    print()


def print_stability(top: int, agreements: Sequence[Agreement]) -> None:
    """Print how far the strongest features of several graphs agree."""
    from fastadapt.reporting.formatting import number

    rows = [
        [
            a.name,
            str(a.pairs),
            "{} [{}, {}]".format(*(number(x, 2) for x in a.jaccard)),
            number(a.chance, 2),
        ]
        for a in agreements
    ]
    print(f"\n{top} strongest features of each graph:\n")
    print_table(["pairs of texts", "pairs", "Jaccard index", "random features"], rows)


def texts_of(run: Path, document: GraphFile) -> dict[tuple[int, int], str]:
    """Return a text for each feature of a graph, from the run's store; empty without a store."""
    from fastadapt.errors import UserError
    from fastadapt.graphs.labels import feature_labels, store_of, units_of

    try:
        store = store_of(run, document)
    except UserError as error:
        print(f"Features are shown without their texts: {error}\n")
        return {}
    return {} if store is None else feature_labels(store, units_of(document))


def print_graph(
    graph: Graph, document: GraphFile, path: Path, labels: dict[tuple[int, int], str]
) -> None:
    """Print the strongest edges into the target and the strongest paths, with each node's label."""
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
    ranks = document["stream"] == "ranks"
    labels = {
        "with_adapters": f"value in the {'target' if ranks else document['stream']}",
        "hybrid": "value without the low-rank parts" if ranks else "value in the hybrid",
        "features": f"difference: {'rank components' if ranks else 'features'}",
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
    ranks = document["stream"] == "ranks"
    units, later = ("components", "components") if ranks else ("features", "adapters")
    rows = []
    for sample in evidence["samples"]:
        for line in sample["correlations"]:
            cells = [
                f"{number(mean, 2)} [{number(low, 2)}, {number(high, 2)}]"
                for mean, low, high in (line["spearman"], line["pearson"])
            ]
            rows.append([f"{len(sample['nodes'])} {sample['name']}", line["predictor"], *cells])
    print()
    print_table([f"ablated {units}", "predicted by", "Spearman", "Pearson"], rows)
    curve = evidence["curve"]
    columns = (
        curve["ablated"],
        curve["ablated_random"],
        curve["isolated"],
        curve["isolated_random"],
    )
    print()
    print_table(
        [units, "ablated", "random", "only these", "random"],
        [[str(n), *(percent(column[i]) for column in columns)] for i, n in enumerate(curve["n"])],
    )
    print(f"\nLater {later} undo {percent(evidence['returned'])} of the ablations' effects.")
