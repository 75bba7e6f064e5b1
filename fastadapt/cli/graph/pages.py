"""Commands `fastadapt graph export` and `fastadapt graph serve`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastadapt.features.site.server import PORT
from fastadapt.graphs.pruning import PruneConfig

if TYPE_CHECKING:
    from fastadapt.features.store.store import Store

Format = Literal["pages", "circuit-tracer"]


def export(
    graphs: list[str],
    *,
    format: Format = "pages",
    output: str | None = None,
    features: str | None = None,
    slug: str | None = None,
    scan: str | None = None,
    overwrite: bool = False,
    config: PruneConfig,
) -> int:
    """Write graphs as pages for a browser, or in the JSON of circuit-tracer and Neuronpedia.

    Args:
        graphs: files of graphs, or runs with graphs
        format: pages, or circuit-tracer (biases are added to errors, see docs/graphs.md)
        output: folder to write; by default one named after the format, beside the first graph
        features: run or store with the features of the graphs; by default those of the run
        slug: circuit-tracer: name of the graph; by default that of its file
        scan: circuit-tracer: name of the model; by default that of the target
        overwrite: circuit-tracer: replace files that exist
    """
    from fastadapt.graphs.site import export as write_pages
    from fastadapt.graphs.site import find_graphs
    from fastadapt.io.names import typed_path

    files = find_graphs(graphs)
    name = "site" if format == "pages" else format
    folder = files[0].parent / name if output is None else typed_path(output, "--output")
    if format == "pages":
        pages = write_pages(files, folder, store=_store(features))
        print(f"pages: {pages / 'index.html'}")
    else:
        _to_circuit_tracer(files, folder, features, slug, scan, config, overwrite=overwrite)
    return 0


def serve(graphs: list[str], *, features: str | None = None, port: int = PORT) -> int:
    """Serve pages of graphs to this machine only, until Ctrl-C.

    Args:
        graphs: files of graphs, or runs with graphs
        features: run or store with the features of the graphs; by default those of the run
        port: port to listen at; 0: any free one
    """
    from fastadapt.cli.progress import stoppable
    from fastadapt.graphs.site import find_graphs
    from fastadapt.graphs.site import serve as serve_pages

    files, store = find_graphs(graphs), _store(features)
    with stoppable() as (stop, _):
        serve_pages(
            files,
            store=store,
            port=port,
            ready=lambda address: print(f"{address}  (Ctrl-C ends it)", flush=True),
            stop=stop,
        )
    return 0


def _store(features: str | None) -> Store | None:
    from fastadapt.features.store.store import Store

    return None if features is None else Store.open(features)


def _to_circuit_tracer(
    files: list[Path],
    folder: Path,
    features: str | None,
    slug: str | None,
    scan: str | None,
    config: PruneConfig,
    *,
    overwrite: bool,
) -> None:
    from fastadapt.cli.console import print_table
    from fastadapt.errors import UserError
    from fastadapt.graphs.files import read_graph
    from fastadapt.graphs.labels import check_store, feature_labels, store_of, units_of
    from fastadapt.interop.circuit_tracer import convert, slug_of, write
    from fastadapt.reporting.formatting import percent

    if slug is not None and len(files) > 1:
        raise UserError(f"--slug: expected one graph, got {len(files)}; leave --slug out")
    graphs, given = [read_graph(file) for file in files], _store(features)
    for file, graph in zip(files, graphs, strict=True):
        if given is not None:
            check_store(file, graph, given)
    rows = []
    for file, graph in zip(files, graphs, strict=True):
        store = given or store_of(file.resolve().parent.parent, graph)
        labels = {} if store is None else feature_labels(store, units_of(graph))
        model = scan or slug_of(Path(graph["models"]["target"]).name)
        name = slug or slug_of(file.stem)
        document, left = convert(graph, config, slug=name, scan=model, labels=labels)
        path = write(document, folder, overwrite=overwrite)
        shares = (percent(1 - left.nodes_share), percent(1 - left.edges_share))
        counts = (f"{len(document['nodes']):,}", f"{len(document['links']):,}")
        rows.append([path.name, *counts, *shares])
    print_table(["file", "nodes", "edges", "nodes' influence pruned", "edges'"], rows)
    print(f"\nfolder: {folder.resolve()}")
