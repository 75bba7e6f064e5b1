"""A store of features as pages: exported to a folder, served on this machine.

The pages need no network and no server. A browser reads no data from files but scripts, so the
data are scripts (:mod:`fastadapt.features.site.shards`), each loaded when it is wanted.
"""

from fastadapt.features.site.pages import export
from fastadapt.features.site.server import serve

__all__ = ["export", "serve"]
