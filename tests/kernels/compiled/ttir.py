"""Find 32-bit products that reach an address, in the text of Triton's IR.

An element's offset (rows x row length) can exceed 2**31 and must be computed in 64 bits: a 32-bit
product wraps before it is widened. :func:`narrow_products` follows every address backwards and
returns its 32-bit products and left shifts, except for two kinds that cannot wrap:

- products of compile-time values (constants, ranges) whose bounds' product is below 2**31;
- products with a constant of at most :data:`TILE`. They number rows or columns (index of a tile
  times its extent), of which there are fewer than 2**31.

The text is MLIR with one operation per line and regions in braces. A name is visible in its region
and nested regions; sibling regions may reuse the name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

#: Largest extent of a tile; constant factors up to this value count as extents.
TILE = 256

_NAME = re.compile(r"%[\w.$-]+(?:#\d+)?")
_RESULTS = re.compile(r"^((?:%[\w.$-]+(?::\d+)?(?:, )?)+) = ")
_OPERATION = re.compile(r'^"?([a-z_]+\.[\w.]+)"?')
_TYPE = re.compile(r": (?:tensor<(?:\d+x)*)?(i\d+|index)>?(?: |$)")
_LOCATION = re.compile(r" loc\((?:[^()]|\([^()]*\))*\)")
_PRODUCTS = ("arith.muli", "arith.shli")
_SUMS = ("arith.addi", "arith.subi")
_BOUNDED_BY_SOURCES = (
    "arith.ext", "arith.trunc", "arith.min", "arith.max", "arith.div",
    "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans",
)  # fmt: skip
#: Operations whose operands do not influence the address's size.
_OPAQUE = ("tt.load", "arith.cmpi", "arith.cmpf")


@dataclass(eq=False)
class Value:
    """A result, an argument of the kernel, or an argument of a region."""

    operation: str
    text: str
    sources: list[Value] = field(default_factory=list)

    @property
    def bound(self) -> int | None:
        """Largest magnitude if known at compile time, else None."""
        if self.operation == "arith.constant":
            number = self.text.split("arith.constant")[1].split(" : ")[0]
            return max((abs(int(n)) for n in re.findall(r"-?\d+", number)), default=None)
        if self.operation == "tt.make_range":
            return max(int(n) for n in re.findall(r"(?:start|end) = (\d+)", self.text))
        if not self.operation.startswith((*_SUMS, *_PRODUCTS, *_BOUNDED_BY_SOURCES)):
            return None  # also ends the recursion at loop-carried values
        bounds = [bound for source in self.sources if (bound := source.bound) is not None]
        if len(bounds) < len(self.sources):
            return None
        if self.operation in _SUMS:
            return sum(bounds)
        if self.operation in _PRODUCTS:
            left, right = bounds
            return left * right if self.operation == "arith.muli" else left << min(right, 64)
        return max(bounds)

    @property
    def constant(self) -> int | None:
        """Bound of a constant or of a tensor filled with one, else None."""
        value = self
        while value.operation in ("tt.splat", "tt.broadcast", "tt.expand_dims"):
            value = value.sources[0]
        return value.bound if value.operation == "arith.constant" else None


def narrow_products(text: str) -> list[str]:
    """Return the lines of `text` with 32-bit products and shifts that reach an address."""
    lines: dict[int, str] = {}
    seen: set[int] = set()
    pending = _addresses(text)
    while pending:
        value = pending.pop()
        if id(value) in seen or value.operation in _OPAQUE:
            continue
        seen.add(id(value))
        if value.operation in _PRODUCTS and _may_wrap(value):
            lines[id(value)] = value.text
        # The condition of a select does not enter the address.
        pending += value.sources[1:] if value.operation == "arith.select" else value.sources
    order = {line.strip(): n for n, line in enumerate(_LOCATION.sub("", text).splitlines())}
    return sorted(lines.values(), key=lambda line: order[line])


def _may_wrap(value: Value) -> bool:
    kind = _TYPE.search(value.text)
    if kind is None:
        raise ValueError(f"no type in {value.text!r}")
    if kind[1] == "i64":
        return False
    left, right = value.sources
    if left.bound is not None and right.bound is not None:
        # Shifts of compile-time values are bit masks.
        return value.operation == "arith.muli" and left.bound * right.bound >= 2**31
    if value.operation == "arith.shli":
        return right.constant is None or 1 << right.constant > TILE
    factor = right.constant if left.constant is None else left.constant
    return factor is None or factor > TILE


def _addresses(text: str) -> list[Value]:
    """Return offsets added to pointers."""
    reader = _Reader()
    for line in _LOCATION.sub("", text).splitlines():
        reader.read(line.strip())
    if reader.regions:
        raise ValueError("a region is not closed")
    return reader.addresses


@dataclass
class _Region:
    """An open region: its names, and the operation that contains the region."""

    names: dict[str, Value]
    operation: str
    results: list[Value]
    carried: list[Value]


class _Reader:
    """Read operations line by line into a graph of values; resolve names in their region."""

    def __init__(self) -> None:
        self.regions: list[_Region] = []
        self.closed: _Region | None = None  # the region that `} else {` or `} do {` continues
        self.addresses: list[Value] = []
        self.branches: dict[str, list[list[Value]]] = {}  # arguments that jumps pass to a block

    def read(self, line: str) -> None:
        if line.startswith("}"):
            self.closed = self.regions.pop()
            if line.endswith("{"):
                self.regions.append(
                    _Region({}, self.closed.operation, self.closed.results, self.closed.carried)
                )
        elif line.startswith(("module", "tt.func", "builtin.module")) and line.endswith("{"):
            arguments = _NAME.findall(line)
            names = {name: Value("argument", name) for name in arguments}
            self.regions.append(_Region(names, "function", [], []))
        elif line.startswith("^"):
            self._enter_block(line)
        elif line and not line.startswith(("#", "//", "{-#")):
            self._operation(line)

    def _operation(self, line: str) -> None:
        head = _RESULTS.match(line)
        body = line[head.end() :] if head else line
        name = _OPERATION.match(body)
        operation = name[1] if name else body.split(" ")[0]
        if operation == "scf.for":
            self._loop(line, head)
            return
        if operation == "tt.call":
            raise ValueError(f"calls are not followed: {line!r}")
        carried: list[Value] = []
        if operation == "scf.while":
            carried, body = self._carried(body), ""
        operands = [self._find(n) for n in _NAME.findall(body)]
        if operation in ("cf.br", "cf.cond_br"):
            for label, arguments in re.findall(r"(\^\w+)(?:\(([^:]*))?", body):
                values = [self._find(n) for n in _NAME.findall(arguments)]
                self.branches.setdefault(label, []).append(values)
        elif operation in ("scf.yield", "scf.condition"):
            self._leave_region(operation, operands)
        elif operation in ("tt.reduce.return", "tt.scan.return"):
            for result in self.regions[-1].results:
                result.sources += operands
        elif operation == "tt.addptr":
            self.addresses.append(operands[1])
        elif operation.startswith(("tt.descriptor_", "tt.make_tensor_descriptor")):
            raise ValueError(f"descriptors are not followed: {line!r}")
        opens = line.endswith("{")
        sources = [] if operation == "scf.if" else operands
        results = self._define(head, operation, line, sources)
        if opens:
            names = {c.text: c for c in carried}
            self.regions.append(_Region(names, operation, results, carried))

    def _loop(self, line: str, head: re.Match[str] | None) -> None:
        parts = re.search(r"scf\.for (?:unsigned )?(%\S+) = (%\S+) to (%\S+) step (%\S+)", line)
        if parts is None:
            raise ValueError(f"cannot read {line!r}")
        # The counter does not exceed the upper bound.
        counter = Value("counter", line, [self._find(parts[2]), self._find(parts[4])])
        carried = self._carried(line.partition("iter_args(")[2])
        results = self._define(head, "scf.for", line, [])
        for result, value in zip(results, carried, strict=True):
            result.sources.append(value)
        names = {parts[1]: counter} | {c.text: c for c in carried}
        self.regions.append(_Region(names, "scf.for", results, carried))

    def _carried(self, text: str) -> list[Value]:
        """Return a loop's carried values, from pairs of an inner name and the initial value."""
        pairs = re.findall(r"(%[\w.$-]+) = (%[\w.$#-]+)", text)
        return [Value("carried", name, [self._find(start)]) for name, start in pairs]

    def _enter_block(self, line: str) -> None:
        """Define the arguments of a block with their sources."""
        region = self.regions[-1]
        arguments = _NAME.findall(line)
        if region.operation == "scf.while":  # values that the condition passes
            sources = [[result] for result in region.results]
        elif region.operation == "function":
            jumps = self.branches[re.match(r"\^\w+", line)[0]]  # type: ignore[index]
            sources = [list(values) for values in zip(*jumps, strict=True)]
        else:  # elements of a reduction
            sources = [list(region.results) for _ in arguments]
        for name, source in zip(arguments, sources, strict=True):
            region.names[name] = Value("argument", name, source)

    def _leave_region(self, operation: str, operands: list[Value]) -> None:
        region = self.regions[-1]
        loops = region.operation in ("scf.for", "scf.while") and operation == "scf.yield"
        targets = region.carried if loops else region.results
        values = operands[1:] if operation == "scf.condition" else operands
        for target, value in zip(targets, values, strict=True):
            target.sources.append(value)

    def _define(
        self, head: re.Match[str] | None, operation: str, line: str, sources: list[Value]
    ) -> list[Value]:
        results: list[Value] = []
        for name in head[1].split(", ") if head else []:
            name, _, count = name.partition(":")
            values = [Value(operation, line, list(sources)) for _ in range(int(count or 1))]
            names = [f"{name}#{n}" for n in range(len(values))] if count else [name]
            self.regions[-1].names |= dict(zip(names, values, strict=True))
            results += values
        return results

    def _find(self, name: str) -> Value:
        for region in reversed(self.regions):
            if name in region.names:
                return region.names[name]
        raise ValueError(f"{name} is used before it is defined")
