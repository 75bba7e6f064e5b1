"""Reads the prompts of held-out conversations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from typing_extensions import NotRequired, TypedDict

from fastadapt.data.prepare.filter_pass import text_or_none
from fastadapt.data.rendered import Prefill, Spec
from fastadapt.data.rendering import get_form, opening_of
from fastadapt.data.sources import BadRows, Policy, Source, read_contents
from fastadapt.data.templates.auto_format import resolve
from fastadapt.data.tokens import Encoder, Markers
from fastadapt.errors import UserError
from fastadapt.io.documents import DocumentError, Mapped, read_yaml
from fastadapt.io.names import has_file

if TYPE_CHECKING:
    from fastadapt.evaluation.models_under_test import ModelSet


class Prompt(NamedTuple):
    """The rendered prompt of a held-out conversation.

    Attributes:
        id: index of the conversation in its source.
        ids: tokens of the prompt.
        domain: domain of the problem, if the data have that column.
    """

    id: str
    ids: list[int]
    domain: str | None


class HeldOut(NamedTuple):
    """A run's validation data, as named in its ``config.yaml``."""

    source: str
    split: str
    revision: str | None
    family: Spec
    subset: str | None = None
    columns: str | None = None
    bad_rows: Policy = "stop"
    markers: Markers = "text"

    def __repr__(self) -> str:
        """Return the fields that are not defaults: the text identifies stored responses."""
        values = self._asdict()
        defaults = {"subset": None, "columns": None, "bad_rows": "stop", "markers": "text"}
        for name, default in defaults.items():
            if values[name] == default:
                del values[name]
        return f"HeldOut({', '.join(f'{name}={value!r}' for name, value in values.items())})"

    def read_as(self) -> Source:
        """Return the data as a :class:`Source`, with the settings for reading them."""
        return Source(self.source, self.split, self.revision, self.subset, self.columns)


class _DataSection(TypedDict):
    validation: str
    validation_split: str
    revision: str | None
    family: str | Mapped
    subset: NotRequired[str | None]
    columns: NotRequired[str | None]
    bad_rows: NotRequired[Policy]
    markers: NotRequired[Markers]
    train_on_prompt: NotRequired[object]  # of versions that read markers as tokens


class _RunFile(TypedDict):
    data: _DataSection


def held_out(run: Path) -> HeldOut | None:
    """Return the held-out data of a run; None if the folder has no ``config.yaml``.

    Raises:
        UserError: the configuration cannot be read.
    """
    path = run / "config.yaml"
    if not has_file(path):
        return None
    try:
        data = read_yaml(path, _RunFile)["data"]
    except DocumentError as error:
        raise UserError(
            f"{path}: expected the configuration that `fastadapt train` wrote: {error}"
        ) from error
    return HeldOut(
        data["validation"],
        data["validation_split"],
        data["revision"],
        data["family"],
        data.get("subset"),
        data.get("columns"),
        data.get("bad_rows", "stop"),
        data.get("markers", "tokens" if "train_on_prompt" in data else "text"),
    )


def family_of(models: ModelSet) -> Spec | None:
    """Return the chat format of the first run's data, not "auto"; None if not recorded.

    Raises:
        UserError: the run's configuration cannot be read, or "auto" stands for no format.
    """
    family, run = models.family, models.compared[models.runs[0]].run
    if family is None and run is not None and (recorded := held_out(Path(run))) is not None:
        family = recorded.family
    return None if family is None else resolve(family, models.tokenizer)


def load_prompts(
    source: Source,
    tokenizer: Any,
    family: Spec,
    n: int,
    *,
    bad_rows: Policy = "stop",
    markers: Markers = "text",
    prefill: Prefill | None = None,
) -> list[Prompt]:
    """Return the prompts of the first ``n`` conversations of a source, rendered as in training.

    The prompt of a conversation is its text before the assistant's last turn.

    Args:
        source: the data set.
        tokenizer: tokenizer of the pair.
        family: see :func:`fastadapt.data.rendering.get_form`.
        n: largest number of prompts.
        bad_rows: what happens to rows that cannot be read or rendered.
        markers: whether special tokens in a turn's words are text or tokens.
        prefill: how prompts open the response, see :func:`fastadapt.data.rendering.opening_of`.

    Raises:
        UserError: the source cannot be read, is empty, or holds no conversations; or a conversation
            is malformed.
    """
    bad = BadRows(bad_rows)
    form = get_form(resolve(family, tokenizer))
    opening, encoder = opening_of(form, prefill), Encoder(tokenizer, form, markers)
    layout, rows = read_contents(source, optional=["domain"], bad=bad)
    prompts: list[Prompt] = []
    for row in rows:
        if len(prompts) == n:
            break
        if not row.content.turns:
            raise UserError(
                f"data source {source.name!r} holds {layout}, which have no prompts; give "
                "conversations (--texts.prompts)"
            )
        try:
            text = form.render(row.content.turns).prompt(opening)
            ids = encoder.encode([text])[0].ids
        except UserError as error:
            bad.take(error, row.where)
            continue
        domain = text_or_none(row.values.get("domain"))
        prompts.append(Prompt(str(row.number), list(ids), domain))
    if not prompts:
        raise UserError(
            f"data source {source.name!r} holds no conversation that can be read "
            f"({bad.counts.total():,} skipped); give another one (--texts.prompts)"
        )
    return prompts
