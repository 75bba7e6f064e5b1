"""Seeded texts for the degeneration rule: planted loops, and sound texts with many repetitions.

Tokens are the pieces into which Qwen's and DeepSeek's tokenizers split texts before merging: words
with the preceding space, single digits, runs of punctuation, line breaks with surrounding spaces.
Merges within a word would only make n-grams less frequent.
"""

from __future__ import annotations

import random
import re

PIECES = re.compile(
    r"'(?:[sdmt]|ll|ve|re)|[^\r\n\w]?[^\W\d_]+|\d| ?[^\s\w]+[\r\n]*|_|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenize(text: str, known: dict[str, int] | None = None) -> list[int]:
    """Return ids of the pieces of a text, numbered by first occurrence."""
    known = {} if known is None else known
    pieces = PIECES.findall(text)
    assert "".join(pieces) == text
    return [known.setdefault(piece, len(known)) for piece in pieces]


def planted_loop(rng: random.Random, period: int, noise: float) -> tuple[list[int], int]:
    """Return random tokens followed by a noisy loop, and the index at which the loop begins.

    Each token of the loop is replaced with probability ``noise``.
    """
    head = [rng.randrange(5000) for _ in range(rng.randint(50, 400))]
    unit = [rng.randrange(5000) for _ in range(period)]
    body = [unit[i % period] for i in range(rng.randint(600, 1200))]
    noisy = [rng.randrange(5000) if rng.random() < noise else token for token in body]
    return head + noisy, len(head)


_WORDS = {
    kind: words.split(",")
    for kind, words in (
        line.strip().split(": ")
        for line in """
        openings: So,Hmm,Wait,Now,But,Okay,Well,Alternatively,Therefore,Then,Actually,Next,Still
        doers: I,we,one,this,that,it
        verbs: check,rewrite,expand,factor,compare,simplify,bound,replace,solve,recall,need,find
        more verbs: keep,drop,test,isolate,combine,cancel,estimate,double
        adjectives: left,right,first,second,other,same,whole,constant,linear,quadratic,negative,odd
        more adjectives: positive,largest,remaining,even,simple,missing
        nouns: term,factor,side,root,value,sum,product,coefficient,constant,remainder,equation,case
        more nouns: bound,square,fraction,variable,sign,step,pattern,condition
        links: because,so that,while,before,after,unless,since,and then,or else,although,until
        leads: which gives,so,and hence,that is,to get,once more,again,leading to,in short
        names: total,count,index,left,right,result,items,value,node,graph,best,cost,i,j,n,path
        """.strip().splitlines()
    )
}


def _word(rng: random.Random, kind: str) -> str:
    return rng.choice(_WORDS[kind] + _WORDS.get(f"more {kind}", []))


def _clause(rng: random.Random) -> str:
    words = [_word(rng, "doers"), _word(rng, "verbs"), "the"]
    if rng.random() < 0.6:
        words.append(_word(rng, "adjectives"))
    return " ".join([*words, _word(rng, "nouns")])


def _sentence(rng: random.Random, equation: str | None) -> str:
    text = f"{_word(rng, 'openings')}, {_clause(rng)}"
    if equation is None or rng.random() < 0.5:
        text += f" {_word(rng, 'links')} {_clause(rng)}"
    return text + (f", {_word(rng, 'leads')} ${equation}$." if equation else ".")


def equations(rng: random.Random) -> str:
    """Return reasoning about one equation, with one step in three stated twice."""
    a, b, c = (rng.randint(2, 99) for _ in range(3))
    x = rng.choice("xyzntk")

    def step() -> str:
        return rng.choice(
            (
                f"{a}{x}^2 + {b}{x} = {c}",
                f"{x} = \\frac{{{b} + \\sqrt{{{c}}}}}{{{a}}}",
                f"{a}{x} = {b + c}",
                f"({x} - {a})({x} + {b}) = {c}",
                f"{a}{x}^2 + {b}{x} - {c} = ({x} - {a})({a}{x} + {c})",
            )
        )

    sentences = []
    for _ in range(rng.randint(15, 40)):
        a, b, c = a + rng.randint(0, 3), b + rng.randint(-9, 9), c + rng.randint(-9, 9)
        equation = step()
        for _ in range(rng.choice((1, 1, 2))):
            sentences.append(_sentence(rng, equation))
            if rng.random() < 0.5:
                sentences.append(_sentence(rng, None))
    return rng.choice((" ", "\n\n")).join(sentences)


def table(rng: random.Random) -> str:
    """Return a sentence and a table of numbers, as Markdown, columns or lists."""
    rows, columns = rng.randint(8, 40), rng.randint(3, 7)
    style = rng.choice(("markdown", "columns", "list", "matrix"))
    digits = rng.choice((0, 0, 1, 2))
    top = rng.choice((9.5, 99.5, 999.5, 1.0 if digits else 99.5))
    lines = ["Let me tabulate the values for each case and look for a pattern.", ""]
    if style == "markdown":
        lines += ["| n " + "| f " * (columns - 1) + "|", "|---" * columns + "|"]
    for row in range(1, rows + 1):
        cells = [str(row)] + [f"{rng.uniform(0, top):.{digits}f}" for _ in range(columns - 1)]
        if style == "markdown":
            lines.append("| " + " | ".join(cells) + " |")
        elif style == "columns":
            lines.append(" ".join(f"{cell:>6}" for cell in cells))
        elif style == "list":
            lines.append(f"f({row}) = " + ", ".join(cells[1:]))
        else:
            lines.append("[" + ", ".join(cells) + "],")
    return "\n".join(lines)


def code(rng: random.Random) -> str:
    """Return a module of short functions with loops, conditions and returns."""
    lines: list[str] = []
    for _ in range(rng.randint(5, 12)):
        f, g = rng.sample(_WORDS["names"], 2)
        arguments = rng.sample(_WORDS["names"], rng.randint(1, 3))
        lines += [f"def {f}_{g}({', '.join(arguments)}):"]
        depth = 1
        for _ in range(rng.randint(4, 10)):
            a, b, c = rng.sample(_WORDS["names"], 3)
            indent = "    " * depth
            kind = rng.random()
            if kind < 0.2:
                lines.append(f"{indent}for {a} in range({b}):")
                depth = min(depth + 1, 3)
            elif kind < 0.35:
                lines.append(f"{indent}if {a} {rng.choice(('<', '>', '==', '!='))} {b}:")
                depth = min(depth + 1, 3)
            elif kind < 0.6:
                lines.append(f"{indent}{a} = {b} {rng.choice('+-*')} {rng.randint(0, 9)}")
            elif kind < 0.75:
                lines.append(f"{indent}{a}[{b}] += {c}")
            elif kind < 0.9:
                lines.append(f"{indent}{a}.append({b} - {c})")
            else:
                lines.append(f"{indent}# the {c} of each {a} is kept")
                depth = max(depth - 1, 1)
        lines += [f"    return {_word(rng, 'names')}", "", ""]
    return "\n".join(lines)


SOUND = (table, equations, code)
