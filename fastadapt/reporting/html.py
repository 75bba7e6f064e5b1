"""The look of the report: its style sheet, for light and dark pages, and the parts of a page.

Text given to these functions is escaped; drawings, legends and content are HTML.
"""

from __future__ import annotations

from html import escape

from fastadapt.reporting.formatting import number

STYLE = """
:root{--page:#f6f6f4;--card:#ffffff;--ink:#16181d;--soft:#5a606c;--line:#e2e2de;--grid:#ecece8;
--main:#2b6fd6;--held:#d2521c;--base:#858a94;--good:#12704f;--good-bg:#e0f2ea;--warn:#8f4f06;
--warn-bg:#fbeeda;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--page:#121417;--card:#1b1e23;--ink:#eceef1;--soft:#a0a7b4;
--line:#2e333b;--grid:#282d34;--main:#6aa3f5;--held:#f08a5a;--base:#7e8591;--good:#6fd3ae;
--good-bg:#17342a;--warn:#f0b866;--warn-bg:#3a2c17}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,
"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1240px;margin:0 auto;padding:32px 28px 56px}
.top{display:flex;flex-wrap:wrap;align-items:baseline;gap:2px 14px}
.brand{flex-basis:100%;margin:0;color:var(--soft);font-size:13px;letter-spacing:.02em}
h1{margin:0;font-size:28px;line-height:1.2;font-weight:650;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{margin:0;font-size:18px;font-weight:650}
h3{margin:0;font-size:14px;font-weight:600}
.state{font-size:12.5px;font-weight:600;padding:2px 10px;border-radius:99px}
.done{color:var(--good);background:var(--good-bg)}
.open{color:var(--warn);background:var(--warn-bg)}
section{margin-top:34px}
section>header{display:flex;flex-wrap:wrap;align-items:baseline;gap:2px 12px;margin-bottom:12px}
.note,.none,figcaption{color:var(--soft);font-size:13px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:12px;margin-top:22px}
.tile,.card,.scroll,details{background:var(--card);border:1px solid var(--line);border-radius:10px}
.tile{padding:13px 16px 12px;display:flex;flex-direction:column}
.tile span{font-size:13px;color:var(--soft)}
.tile b{font-size:25px;line-height:1.3;font-weight:650;letter-spacing:-.01em}
.tile i{font-style:normal;font-size:12.5px;color:var(--soft)}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,350px),1fr));gap:12px}
.small{grid-template-columns:repeat(auto-fill,minmax(min(100%,185px),1fr))}
.grid+h3{margin:18px 0 10px}
.small .legend{margin:0;min-height:0}.small .card header{margin-bottom:2px}
.card{margin:0;padding:13px 14px 8px;min-width:0;display:flex;flex-direction:column}
.card svg{margin-top:auto}
.card header{display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 10px;
align-items:baseline}
.card header span{color:var(--soft);font-size:12.5px}
.legend{display:flex;flex-wrap:wrap;gap:0 14px;margin:2px 0 4px;font-size:12.5px;color:var(--soft);
min-height:19px;align-items:center}
.legend b{font-weight:600;color:var(--ink);font-variant-numeric:tabular-nums}
.legend i{display:inline-block;width:14px;height:3px;border-radius:2px;margin-right:6px;
vertical-align:middle}
.legend i.main{background:var(--main)}.legend i.held{background:var(--held)}
.legend i.base{background:repeating-linear-gradient(90deg,var(--base) 0 4px,transparent 4px 7px)}
.legend .ramp{width:96px;height:7px;margin:0 8px}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font:11px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;fill:var(--soft);
font-variant-numeric:tabular-nums}
svg .y,svg .name{text-anchor:end}svg .x,svg .none{text-anchor:middle}
.grid-line{stroke:var(--grid);fill:none}.axis{stroke:var(--line);fill:none}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.line.main{stroke:var(--main)}.line.held{stroke:var(--held);stroke-width:1.5}
.line.faint{stroke:var(--main);stroke-width:1;opacity:.28}
.line.base{stroke:var(--base);stroke-width:1.4;stroke-dasharray:4 4}
.dot.main,.bar,.dot.faint{fill:var(--main)}.dot.held{fill:var(--held)}.dot.base{fill:var(--base)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:7px 16px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}
th{font-weight:600;color:var(--soft);font-size:13px}
tbody tr:last-child td{border-bottom:0}
.compare td:nth-child(3){font-weight:600}
.facts td{text-align:left;white-space:normal;overflow-wrap:anywhere}
.facts td:first-child{color:var(--soft);width:190px}.facts thead{display:none}
details{margin-top:12px}
summary{cursor:pointer;padding:11px 16px;font-weight:600;font-size:14px}
pre{margin:0;padding:4px 16px 16px;overflow-x:auto;font:12.5px/1.55 ui-monospace,SFMono-Regular,
Menlo,Consolas,"Liberation Mono",monospace}
@media (max-width:560px){main{padding:20px 12px 40px}h1{font-size:23px}section{margin-top:26px}
.tiles{grid-template-columns:1fr 1fr;gap:8px}.tile{padding:10px 12px}.tile b{font-size:21px}
.grid{gap:8px}th,td{padding:7px 9px}.small{grid-template-columns:1fr 1fr}
.compare td:first-child{white-space:normal}
.facts td:first-child{width:110px}}
@media print{body{background:#fff}.card,.tile,.scroll{break-inside:avoid}}
"""


def section(title: str, content: str, note: str = "") -> str:
    """A titled part of the page; nothing where there is no content."""
    if not content:
        return ""
    aside = f'<span class="note">{escape(note)}</span>' if note else ""
    return f"<section><header><h2>{escape(title)}</h2>{aside}</header>{content}</section>"


def table(head: list[str], rows: list[list[str]], kind: str = "") -> str:
    """Rows under a head, in a frame that scrolls sideways."""
    top = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def card(title: str, unit: str, chart: str, legend: str = "") -> str:
    """A drawing with its title, unit and legend."""
    return (
        f'<figure class="card"><header><h3>{escape(title)}</h3>'
        f"<span>{escape(unit)}</span></header>"
        f'<div class="legend">{legend}</div>{chart}</figure>'
    )


def legend_key(style: str, name: str, value: float | None) -> str:
    """An entry of a legend: a line of the style, its name, its last value."""
    return f'<span><i class="{style}"></i>{escape(name)} <b>{number(value)}</b></span>'


def grid(cards: list[str], kind: str = "grid") -> str:
    """Cards side by side, as many as fit; nothing where there is none."""
    kept = [c for c in cards if c]
    return f'<div class="{kind}">{"".join(kept)}</div>' if kept else ""
