"""Pages of a feature store: export to a folder, and a local server.

The pages need no network and no server. A page opened as a file may load scripts but no other
files, so the data are scripts (:mod:`fastadapt.features.site.shards`) that are loaded on demand.
"""

from fastadapt.features.site.pages import export
from fastadapt.features.site.server import serve

__all__ = ["export", "serve"]
