"""What `fastadapt export` does: a run, adapters or a published checkpoint in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fastadapt.adapter_files import adapters_of, read_adapters
from fastadapt.errors import UserError
from fastadapt.organism import resolve

Format = Literal["huggingface", "hu2026", "adapters"]


def convert(
    source: str,
    output: str,
    format: Format = "huggingface",
    *,
    target: str | None = None,
    base: str | None = None,
) -> str:
    """Write ``source`` in another format, tensor by tensor.

    Args:
        source: a run, or a folder of adapters; for ``adapters`` a checkpoint published with
            arXiv 2602.20904, a folder or hub id.
        output: a new folder.
        format: ``huggingface``, a checkpoint for ``AutoModelForCausalLM``; ``hu2026``, one in the
            published format; ``adapters``, this library's own.
        target, base: the pair, where it is not the one that the adapters name, or they name none.

    Returns:
        How to load what was written.

    Raises:
        UserError: no such source, no pair, or a folder in use.
        RunError: the folder cannot be written.
    """
    from fastadapt import serving
    from fastadapt.interop import hu2026

    out = Path(output).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--output: {out} is in use; give a new folder")
    if format == "adapters":
        hu2026.to_adapters(source, out, target=target, base=base)
        return f"import fastadapt; adapters, metadata = fastadapt.load_adapters({str(out)!r})"
    folder = adapters_of(source)
    metadata = read_adapters(folder)[1]["metadata"]
    pair = {"target": target, "base": base}
    revisions: dict[str, str | None] = {}
    for role, typed in pair.items():
        pair[role] = typed or metadata.get(role)
        if not isinstance(pair[role], str):
            raise UserError(f"{folder}: fastadapt.json names no {role}; give --{role}")
        if typed is None:
            revisions[role] = (metadata.get("revisions") or {}).get(role)
    write = serving.export if format == "huggingface" else hu2026.from_adapters
    write(
        folder,
        out,
        target=resolve(str(pair["target"])),
        base=resolve(str(pair["base"])),
        revisions=revisions,
    )
    if format == "hu2026":
        return f"from fastadapt.interop import hu2026; model = hu2026.load({str(out)!r})"
    imports = "import fastadapt.serving; from transformers import AutoModelForCausalLM"
    return f"{imports}; model = AutoModelForCausalLM.from_pretrained({str(out)!r})"
