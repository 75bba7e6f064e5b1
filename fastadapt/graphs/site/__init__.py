"""Pages of attribution graphs: export to a folder, and a local server.

The pages share the shell of the pages of features (:mod:`fastadapt.features.site`): its scripts,
its style sheet, its server. They need no network and no server. Nodes of features link to the
feature's page, if the run has collected features.
"""

from fastadapt.graphs.site.pages import export, find_graphs, serve

__all__ = ["export", "find_graphs", "serve"]
