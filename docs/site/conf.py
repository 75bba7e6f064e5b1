"""Settings of the documentation site, which ``make docs`` builds with Sphinx.

The source folder is the repository, so that a link between two pages is the same here and on a
file host. README.md is the first page. Every page of ``docs/`` is in the contents: one that no
section names is listed at the end.
"""

from __future__ import annotations

import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.logging import getLogger

import fastadapt

ROOT = Path(__file__).parents[2]

SECTIONS = {
    "Start": (
        "docs/first-hour",
        "docs/notebooks/first-hour",
        "docs/your-pair",
        "docs/notebooks/your-pair",
        "docs/h100",
    ),
    "Use": (
        "docs/where",
        "docs/data",
        "docs/training",
        "docs/evaluation",
        "docs/features",
        "docs/python",
        "docs/graphs",
        "docs/formats",
        "docs/serving",
        "docs/library",
    ),
    "Results": ("docs/results", "docs/recipes", "docs/paper", "docs/state"),
    "Embedded pairs": (
        "fastadapt/organism/README",
        "fastadapt/organism/gated/README",
        "fastadapt/organism/real/README",
        "reproduce/planted/README",
    ),
    "How it works": ("docs/step", "docs/kernels", "docs/architecture", "benchmarks/NOTES"),
    "Reference": ("docs/api/index", "docs/stability", "docs/other-libraries", "CHANGELOG"),
    "Develop": ("CONTRIBUTING", "docs/adding-an-architecture", "SECURITY"),
}

project = "fastadapt"
release = version = fastadapt.__version__
root_doc = "README"
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb", ".rst": "restructuredtext"}
include_patterns = [
    "*.md",
    "docs/**",
    "fastadapt/organism/**README.md",
    "reproduce/planted/README.md",
    "benchmarks/NOTES.md",
]
exclude_patterns = [".*", "build", "dist", "runs", "data", "tests"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]

nb_execution_mode = "off"  # `make notebooks` executes them
nb_merge_streams = True

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
smartquotes_action = "D"  # dashes; quotes and dots stay as typed
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"fastadapt {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
# The colours of the pages that fastadapt writes (fastadapt/reporting/templates/style.css).
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#2b6fd6", "color-brand-content": "#2b6fd6"},
    "dark_css_variables": {"color-brand-primary": "#6aa3f5", "color-brand-content": "#6aa3f5"},
}


def contents() -> str:
    """Return the tables of contents that stand behind the text of the first page."""
    named = {page for pages in SECTIONS.values() for page in pages}
    others = sorted(f"docs/{path.stem}" for path in ROOT.glob("docs/*.md"))
    sections = {**SECTIONS, "More": tuple(page for page in others if page not in named)}
    return "".join(
        "\n".join(("\n```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```\n"))
        for caption, pages in sections.items()
        if pages
    )


def prepare_page(app: Sphinx, page: str, source: list[str]) -> None:
    """Name linked pages by their titles, not their files; add the contents to the first page."""
    source[0] = re.sub(r"\[[\w-]+\.(md|ipynb)\]\(", "[](", source[0])
    if page == root_doc:
        source[0] += contents()


def keep_colons(
    app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    """Break a line after its first colon, before which Napoleon would read the type of a field."""
    if what in ("attribute", "data", "property") and lines and ": " in lines[0]:
        before, after = lines[0].split(": ", 1)
        lines[:1] = [f"{before}:", after]


def check_names(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn of each public name of a documented module that its page does not have."""
    documented = env.domains.python_domain.objects
    for module in [name for name, entry in documented.items() if entry.objtype == "module"]:
        for name in import_module(module).__all__:
            if f"{module}.{name}" not in documented and name != "__version__":
                getLogger(__name__).warning("%s.%s is public and has no docstring", module, name)


def copy_first_page(app: Sphinx, error: Exception | None) -> None:
    """Write ``index.html``, which a browser opens for the folder."""
    if error is None and app.builder.name == "html":
        shutil.copy(Path(app.outdir) / f"{root_doc}.html", Path(app.outdir) / "index.html")


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the functions of this file to the build."""
    app.add_lexer("order", TextLexer)  # the list of packages in docs/architecture.md
    app.connect("source-read", prepare_page)
    app.connect("autodoc-process-docstring", keep_colons, priority=400)  # before Napoleon
    app.connect("env-check-consistency", check_names)
    app.connect("build-finished", copy_first_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
