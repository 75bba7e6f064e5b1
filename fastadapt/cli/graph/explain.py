"""Command `fastadapt graph`."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

from fastadapt.cli.console import print_table
from fastadapt.cli.parser import Typed
from fastadapt.graphs.evidence import EvidenceConfig
from fastadapt.graphs.explain import Question
from fastadapt.graphs.graph import GraphConfig
from fastadapt.graphs.linear.trace import Stream

if TYPE_CHECKING:
    from fastadapt.evaluation.models_under_test import ModelSet
    from fastadapt.graphs.linear.overlay import TranscoderSet
    from fastadapt.graphs.places import Place, PlaceConfig
    from fastadapt.graphs.schema import GraphFile

GRAPHS = "graphs"  # folder in the run
_REPLACE = "Replace it (--overwrite), or give another --output"
_NAMED = 5  # texts with the same error that the message names


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
    stream: str = "replacement",
    base_set: str | None = None,
    stability: int | None = None,
    output: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    dry_run: Annotated[bool, Typed("--dry-run")] = False,
    tokens: int | None = None,
    gpu: str | None = None,
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
        prompts: folder of prompts, one .txt file each, without one newline at its end; graphs that
            exist are skipped, and refused if they are of other adapters or lack ablations
        responses: file of sampled responses: list the places that --at describes
        at: with --responses: words; list places where one of them is the most likely token
        above: with --at: list places where the words' probability rises to this value instead
        after: with --at: only places after this text in the response, such as `the answer is`
        place: with --at: numbers of places to explain, or `all`; graphs that exist: as
            with --prompts
        token: explain the logit of this token
        against: with --token or --place: explain the difference to the logit of this token
        feature: explain the pre-activation of this feature, as layer/number
        direction: explain a direction of the last state: a safetensors file with a tensor
            `direction`
        position: index of the token to explain; by default the last
        stream: replacement; target, with what the adapters miss as error nodes; or ranks, the
            target with the components of its LoRA as nodes
        base_set: folder of a transcoder set of circuit-tracer for the base, whose features stand
            for the base's MLPs
        stability: after the graphs of --prompts or --place, compare this number of strongest
            features between texts: responses to one prompt, or files whose names are equal up to
            the first dot (7.txt, 7.a.txt), against others
        output: file to write; for several graphs, a folder; by default graphs in the run
        dtype: float32 or float64
        overwrite: replace files that exist
        dry_run: print the memory that a graph needs, and end; reads no weights. RUN may then be a
            preset or a YAML file too
        tokens: with --dry-run: length of the text, in place of a prompt
        gpu: with --dry-run: plan for this GPU (a100, h100, h200) instead of this machine
    """
    from fastadapt.errors import UserError
    from fastadapt.graphs.explain import needs_target_mlps
    from fastadapt.graphs.linear.trace import check_stream
    from fastadapt.graphs.places import PlaceConfig
    from fastadapt.io.names import has_file, typed_path

    check_stream(stream, base_set is not None)
    question = Question(token, against if responses is None else None, feature, direction, position)
    if dry_run:
        from fastadapt.cli.graph.plan import print_plan

        print_plan(
            run,
            tokens,
            prompt,
            stream=cast("Stream", stream),
            question=None if responses is not None else question,
            dtype=dtype,
            gpu=gpu,
            device=device,
            trust_remote_code=trust_remote_code,
            config=config,
            evidence=evidence,
        )
        return 0
    if tokens is not None or gpu is not None:
        raise UserError("--tokens and --gpu go with --dry-run")
    sources = {"PROMPT": prompt, "--prompts": prompts, "--responses": responses}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        raise UserError(f"expected one of {', '.join(sources)}, got {', '.join(given) or 'none'}")
    if responses is None and (at or place or above is not None or after is not None):
        raise UserError(
            "--at, --above, --after and --place go with --responses, a file of sampled responses"
        )
    if responses is not None and (token, feature, direction, position) != (None,) * 4:
        raise UserError(
            "--responses: the chosen place gives the token and its position; leave out --token, "
            "--feature, --direction and --position"
        )
    if stability is not None and (stability < 1 or prompt is not None):
        raise UserError(
            "--stability: expected 1 or more features, with --prompts or --responses; the features "
            "of one text's graph have nothing to be compared with"
        )
    work = _Work(
        run,
        cast("Stream", stream),
        base_set,
        config,
        evidence,
        dtype,
        device,
        trust_remote_code,
        overwrite,
        needs_target_mlps(cast("Stream", stream), None if responses is not None else question),
    )
    folder = typed_path(run, "run") / GRAPHS if output is None else typed_path(output, "--output")
    if prompt is not None:
        path = folder if output is not None else folder / work.name(prompt, question)
        if has_file(path) and not overwrite:  # raises for a folder
            raise UserError(f"{path} exists. {_REPLACE}")
        work.explain(prompt, question, path)
    elif prompts is not None:
        for name, text in _prompts(typed_path(prompts, "--prompts")):
            work.explain_new(text, question, folder, name=name, group=name.split(".")[0])
    else:
        places = work.list_places(str(responses), PlaceConfig(at, above, after))
        for i in _pick(places, place):
            of_place = Question(places[i].token, against)
            name, group = f"place {i}", places[i].id
            work.explain_new(places[i].ids, of_place, folder, name=name, group=group)
    if stability is not None and not work.stopped and not work.errors:
        work.compare(stability, folder)
    if work.stopped:
        print(
            "Stopped; finished graphs are saved. The same command begins again; without "
            "--overwrite, it leaves all graphs that exist."
            if overwrite
            else "Stopped; finished graphs and rows are saved. Run the same command again to go on."
        )
    work.raise_errors()
    return 0


@dataclass
class _Work:
    """The settings of a call, and the run once it is loaded."""

    run: str
    stream: Stream
    base_set: str | None
    config: GraphConfig
    evidence: EvidenceConfig
    dtype: str
    device: str | None
    trust_remote_code: bool
    overwrite: bool
    target_mlps: bool
    stopped: bool = False  # by a signal: no further graph is begun
    groups: dict[Path, str] = field(default_factory=dict)  # of the graphs of this call
    errors: dict[str, list[str]] = field(default_factory=dict)  # messages, with names of texts

    @cached_property
    def models(self) -> ModelSet:
        from fastadapt.graphs.explain import open_models

        return open_models(
            self.run,
            dtype=self.dtype,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
            target_mlps=self.target_mlps,
        )

    @cached_property
    def overlay(self) -> TranscoderSet | None:
        from fastadapt.interop.transcoder_sets import read_transcoder_set

        if self.base_set is None:
            return None
        return read_transcoder_set(self.base_set).like(self.models.model.head)

    def name(self, text: str | Sequence[int], question: Question) -> str:
        """Return the file name of a graph: a hash of the text, the question and the settings."""
        settings = [text, self.stream, self.dtype, vars(question), vars(self.config)]
        settings += [] if self.base_set is None else [str(Path(self.base_set).resolve())]
        packed = json.dumps(settings, sort_keys=True).encode("utf-8", "surrogatepass")
        return f"{hashlib.sha256(packed).hexdigest()[:12]}.json"

    def facts(self, text: str | Sequence[int], question: Question) -> dict[str, object]:
        """Return what the numbers of a graph depend on, by name."""
        import torch

        from fastadapt.models.pair import choose_device

        return {
            "prompt": text,
            "question": vars(question),
            "stream": self.stream,
            "graph settings": vars(self.config),
            "evidence settings": vars(self.evidence),
            "weights": self.models.fingerprint("run"),
            "files": self.files(question),
            "dtype": self.dtype,
            "device": str(choose_device(self.models.config.device)),
            "torch version": torch.__version__,
        }

    @cached_property
    def adapter(self) -> str:
        """The digest of the run's adapters."""
        from fastadapt.adapter.files import adapter_digest, adapters_of

        return adapter_digest(adapters_of(self.run))

    @cached_property
    def base_set_files(self) -> list[tuple[str, int, str]]:
        if self.base_set is None:
            return []
        files = sorted(path for path in Path(self.base_set).glob("*") if path.is_file())
        return [_describe_file(path) for path in files]

    def files(self, question: Question) -> list[tuple[str, int, str]]:
        """Return name, size and SHA-256 of the files of the direction and of the base set."""
        direction = [] if question.direction is None else [_describe_file(Path(question.direction))]
        return direction + self.base_set_files

    def explain_new(
        self, text: str | Sequence[int], question: Question, folder: Path, *, name: str, group: str
    ) -> None:
        """Explain a text, unless the file of its graph exists and ``overwrite`` is false.

        An error of the text, which ``name`` names, is stored in ``errors``: others are explained.
        """
        from fastadapt.errors import UserError

        path = folder / self.name(text, question)
        if self.stopped:
            return
        self.groups[path] = group
        exists = path.exists() and not self.overwrite
        # What all texts share is read first: its errors end the call.
        _ = (self.adapter, self.base_set_files) if exists else (self.models, self.overlay)
        try:
            if exists:
                self.check_existing(path, question)
                print(f"exists: {path.resolve()}")
            else:
                self.explain(text, question, path)
        except UserError as error:
            self.errors.setdefault(str(error), []).append(name)

    def check_existing(self, path: Path, question: Question) -> None:
        """Check that the graph of a file is the one that this call would make.

        Raises:
            UserError: the file says otherwise, or cannot be read.
        """
        from fastadapt.errors import UserError
        from fastadapt.graphs.files import read_graph
        from fastadapt.io.documents import DocumentError

        try:
            document = read_graph(path)
        except DocumentError as error:
            raise UserError(f"{error}. {_REPLACE}") from error
        files = self.files(question)
        if document["adapter"] != self.adapter:
            reason = f"is of other adapters than those of {self.run}"
        elif [tuple(file) for file in document.get("files", files)] != files:
            reason = "is of a --direction or a --base_set whose files had other contents"
        elif _ablations(document) < self.evidence.ablations:
            reason = f"has fewer ablations than {self.evidence.ablations}"
        else:
            return
        raise UserError(f"{path} exists, but {reason}. {_REPLACE}")

    def raise_errors(self) -> None:
        """Raise the errors of all texts as one.

        Raises:
            UserError: a text had an error.
        """
        from fastadapt.errors import UserError

        if not self.errors:
            return
        lines = []
        for message, names in self.errors.items():
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            lines.append(f"{', '.join(names[:_NAMED])}{more}: {message}")
        count = sum(map(len, self.errors.values()))
        what = "1 text has" if count == 1 else f"{count} texts have"
        raise UserError("\n".join([f"{what} no graph of this call:", *lines]))

    def explain(self, text: str | Sequence[int], question: Question, path: Path) -> None:
        from fastadapt.cli.graph.tables import print_base_set, print_graph, texts_of
        from fastadapt.cli.progress import stoppable
        from fastadapt.graphs.explain import explain
        from fastadapt.graphs.files import write_graph
        from fastadapt.graphs.unfinished import Stopped, unfinished

        facts = self.facts(text, question)
        with stoppable() as (stop, progress):
            try:
                with unfinished(path, facts, overwrite=self.overwrite, stop=stop) as batches:
                    result, document = explain(
                        self.models,
                        text,
                        question,
                        self.config,
                        self.evidence,
                        stream=self.stream,
                        overlay=self.overlay,
                        on_base_set=print_base_set,
                        progress=lambda done, n: progress("features", done, n),
                        batches=batches,
                    )
                    if files := self.files(question):
                        document["files"] = files
                    write_graph(document, path, overwrite=self.overwrite)
            except Stopped:
                self.stopped = True
                return
        self.stopped = stop.is_set()
        print_graph(result, document, path, texts_of(Path(self.run), document))

    def compare(self, top: int, folder: Path) -> None:
        """Print and save how far the strongest features of this call's graphs agree."""
        from fastadapt.cli.graph.tables import print_stability
        from fastadapt.graphs.files import read_graph
        from fastadapt.graphs.stability import Fingerprint, save, stability

        graphs = [
            Fingerprint.of_graph(group, read_graph(path), top)
            for path, group in self.groups.items()
        ]
        agreements = stability(graphs, resamples=self.evidence.resamples, seed=self.evidence.seed)
        print_stability(top, agreements)
        names = {path.name: group for path, group in self.groups.items()}
        path = save(folder / "stability", top, agreements, names)
        print(f"\nstability: {path.resolve()}")

    def list_places(self, responses: str, config: PlaceConfig) -> list[Place]:
        """Print and return the positions in responses at which a word of ``--at`` is predicted."""
        from fastadapt.cli.progress import stoppable
        from fastadapt.evaluation.generation.responses import read_responses
        from fastadapt.graphs.places import find_places
        from fastadapt.io.names import typed_path
        from fastadapt.reporting.formatting import number
        from fastadapt.reporting.visible import visible

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


def _prompts(folder: Path) -> list[tuple[str, str]]:
    """Return names and texts of the ``.txt`` files of a folder, in the order of their names."""
    from fastadapt.errors import UserError
    from fastadapt.io.documents import read_text

    files = sorted(folder.glob("*.txt"))
    if not files:
        raise UserError(f"--prompts: expected a folder with .txt files, got {folder}")
    return [(file.name, _without_last_newline(read_text(file))) for file in files]


def _without_last_newline(text: str) -> str:
    """Return a text without the newline that editors write at the end of a file."""
    return text.removesuffix("\r\n") if text.endswith("\r\n") else text.removesuffix("\n")


def _describe_file(path: Path) -> tuple[str, int, str]:
    from fastadapt.io.atomic import digest_of_input

    return path.name, *digest_of_input(path)


def _ablations(document: GraphFile) -> float:
    """Return how many ablations a graph can answer for: all, if it ablates every feature."""
    if "evidence" not in document:
        return 0
    evidence = document["evidence"]
    done = min((len(sample["nodes"]) for sample in evidence["samples"]), default=0)
    return math.inf if done >= max(evidence["curve"]["n"], default=0) else done


def _pick(places: Sequence[Place], numbers: Sequence[str]) -> list[int]:
    from fastadapt.errors import UserError

    if list(numbers) == ["all"]:
        return list(range(len(places)))
    wrong = [n for n in numbers if not (n.isascii() and n.isdigit() and int(n) < len(places))]
    if wrong:
        raise UserError(
            f"--place: {len(places)} places are listed, numbered from 0; expected such numbers, or "
            f"all, got {' '.join(wrong)}"
        )
    return [int(n) for n in numbers]
