// Draws a graph: positions from left to right, layers from bottom to top.
"use strict";

const LEAST_RADIUS = 3;
const MORE_RADIUS = 10; // of the node with the largest influence
const CELL = 132; // widest cell before its nodes continue on another line
const GAP = 10; // between columns
const GUTTER = 58; // labels of layers
const LONGEST = 14; // characters of a token below the picture

/**
 * Draws the picture into a box.
 * state: Graph graph, Set items, Array edges, number selected or null, Set pinned, select (called
 * with an item).
 */
function drawPicture(box, state) {
  const layout = arrange(state.graph, state.items, box.clientWidth);
  const svg = el("svg", {
    width: layout.width, height: layout.height, viewBox: `0 0 ${layout.width} ${layout.height}`,
    class: state.selected === null ? null : "focused",
  });
  // The names of layers stay in view while the picture is scrolled.
  const names = el("div", { class: "layers" });
  layout.lines.forEach(({ y, height, label }, i) => {
    svg.append(el("rect", { class: i % 2 ? "band" : "band odd", x: 0, y, width: layout.width, height }));
    names.append(el("span", { style: { top: `${y + height / 2}px` } }, label));
  });
  const { selected } = state;
  const largest = Math.max(...state.edges.map(({ flow }) => flow), 1e-300);
  const drawn = [...state.edges].reverse(); // the strongest above the others
  const near = (edge) => edge.source === selected || edge.target === selected;
  drawn.sort((a, b) => near(a) - near(b));
  drawn.forEach((edge) => svg.append(drawEdge(edge, layout, edge.flow / largest, near(edge))));
  const neighbours = new Set(drawn.filter(near).flatMap(({ source, target }) => [source, target]));
  for (const item of state.items) svg.append(drawNode(item, state, layout, neighbours.has(item)));
  layout.columns.forEach(({ x, width, position }) => {
    const text = tokenText(state.graph.token(position));
    const label = el("text", { class: "place", x: 0, y: 0, "text-anchor": "end",
      transform: `translate(${x + width / 2 + 4} ${layout.foot + 14}) rotate(-38)` }, shortened(text));
    label.dataset.tip = `${text} · position ${position}`;
    svg.append(label);
  });
  const { scrollLeft } = box;
  const isFirst = box.firstChild === null;
  box.replaceChildren(names, svg);
  box.scrollLeft = isFirst ? layout.width : scrollLeft; // first to the target, which is on the right
}

function shortened(text) {
  return text.length > LONGEST ? `${text.slice(0, LONGEST - 1)}…` : text;
}

/** Returns places of items, columns of positions and lines of layers. */
function arrange(graph, items, room) {
  const largest = Math.max(...[...items].filter((i) => !graph.isTarget(i)).map((i) => graph.items[i].influence), 1e-300);
  const radius = (item) => graph.isTarget(item)
    ? LEAST_RADIUS + MORE_RADIUS
    : LEAST_RADIUS + MORE_RADIUS * Math.sqrt(graph.items[item].influence / largest);
  const cells = new Map(); // "layer position" to lines of items
  const layers = new Map(); // layer to height
  const widths = new Map(); // position to width
  const order = [...items].sort((a, b) => graph.items[b].influence - graph.items[a].influence);
  for (const item of order) {
    const { layer, position } = graph.items[item];
    const key = `${layer} ${position}`;
    if (!cells.has(key)) cells.set(key, [{ width: 0, height: 0, items: [] }]);
    const lines = cells.get(key);
    const size = 2 * radius(item) + 3;
    let line = lines[lines.length - 1];
    if (line.width + size > CELL && line.items.length) lines.push((line = { width: 0, height: 0, items: [] }));
    line.items.push(item);
    line.width += size;
    line.height = Math.max(line.height, size);
    widths.set(position, Math.max(widths.get(position) ?? 22, line.width));
    layers.set(layer, Math.max(layers.get(layer) ?? 0, lines.reduce((sum, { height }) => sum + height, 0)));
  }
  const positions = [...widths.keys()].sort((a, b) => a - b);
  const needed = GUTTER + positions.reduce((sum, position) => sum + widths.get(position) + GAP, 0) + 8;
  const extra = positions.length ? Math.max(0, Math.min(60, (room - needed) / positions.length)) : 0;
  let x = GUTTER;
  const columns = positions.map((position) => {
    const width = widths.get(position) + extra;
    const column = { position, x, width };
    x += width + GAP;
    return column;
  });
  const { n_layers: n } = graph.file;
  const space = n > 12 ? 10 : 22;
  let y = 6;
  const lines = [];
  const labels = (layer) => (layer < 0 ? "tokens" : layer === n ? "target" : `layer ${layer}`);
  for (let layer = n; layer >= -1; layer--) {
    const height = Math.max(layers.get(layer) ?? 0, n > 12 ? 12 : 18) + space;
    lines.push({ layer, y, height, label: labels(layer) });
    y += height;
  }
  const points = new Map();
  const columnOf = new Map(columns.map((column) => [column.position, column]));
  const lineOf = new Map(lines.map((line) => [line.layer, line]));
  for (const [key, rows] of cells) {
    const [layer, position] = key.split(" ").map(Number);
    const line = lineOf.get(layer);
    const column = columnOf.get(position);
    let top = line.y + (line.height - rows.reduce((sum, row) => sum + row.height, 0)) / 2;
    for (const row of rows) {
      let left = column.x + (column.width - row.width) / 2;
      for (const item of row.items) {
        const size = 2 * radius(item) + 3;
        points.set(item, { x: left + size / 2, y: top + row.height / 2, r: radius(item) });
        left += size;
      }
      top += row.height;
    }
  }
  const longest = Math.max(...positions.map((position) => shortened(tokenText(graph.token(position))).length));
  return { points, columns, lines, foot: y, width: Math.max(x + 8, room), height: y + 24 + 4.4 * longest };
}

function drawEdge({ source, target, weight }, { points }, share, near) {
  const from = points.get(source);
  const to = points.get(target);
  const bend = (from.y - to.y) / 2;
  const path = el("path", {
    class: `edge ${weight < 0 ? "lowers" : "raises"}${near ? " near" : ""}`,
    d: `M${from.x} ${from.y}C${from.x} ${from.y - bend} ${to.x} ${to.y + bend} ${to.x} ${to.y}`,
    "data-source": source, "data-target": target,
  });
  path.style.setProperty("stroke-width", String(0.6 + 3.4 * Math.sqrt(share)));
  path.style.setProperty("--strength", String(0.12 + 0.6 * Math.sqrt(share)));
  return path;
}

function drawNode(item, { graph, selected, pinned, select }, { points }, near) {
  const { x, y, r } = points.get(item);
  const { kind, influence } = graph.items[item];
  const names = ["node", kind.replaceAll(" ", "-"), graph.signed[item] < 0 ? "lowers" : "raises"];
  if (item === selected) names.push("selected");
  if (pinned.has(item)) names.push("pinned");
  if (near) names.push("near");
  const group = el("g", {
    class: names.join(" "), "data-item": item, role: "button",
    "aria-label": graph.fullName(item), "aria-pressed": item === selected,
    on: { click: (event) => { event.stopPropagation(); select(item); } },
  }, shape(kind, x, y, r));
  group.dataset.tip = `${graph.fullName(item)} · ${graph.isTarget(item) ? formatNumber(graph.items[item].activation) : formatPercent(influence)}`;
  return group;
}

/** Draws the shape of a kind: a circle for features, a triangle for base features and rank
 * components, a square for tokens, diamonds for others. */
function shape(kind, x, y, r) {
  if (kind === "feature") return el("circle", { cx: x, cy: y, r });
  if (kind === "token" || kind === "target") {
    const a = kind === "target" ? r : 0.88 * r;
    return el("rect", { x: x - a, y: y - a, width: 2 * a, height: 2 * a, rx: kind === "target" ? 5 : 2 });
  }
  if (UNIT_KINDS.includes(kind)) {
    return el("path", { d: `M${x} ${y - r}L${x + r} ${y + 0.8 * r}L${x - r} ${y + 0.8 * r}Z` });
  }
  return el("path", { d: `M${x} ${y - r}L${x + r} ${y}L${x} ${y + r}L${x - r} ${y}Z` });
}

function drawLegend(box, graph) {
  const kinds = new Set(graph.items.map(({ kind }) => kind));
  const key = (kind, text) => [el("svg", { width: 14, height: 14, viewBox: "0 0 14 14" },
    el("g", { class: `node key ${kind.replaceAll(" ", "-")}` }, shape(kind, 7, 7, 5))), text];
  const others = [...kinds].filter((kind) => kind.endsWith("bias"));
  box.replaceChildren(
    ...UNIT_KINDS.filter((kind) => kinds.has(kind)).flatMap((kind) => key(kind, kind)), ...key("token", "token"),
    ...(others.length ? key("decoder bias", "bias") : []),
    ...(kinds.has("error") ? key("error", "error") : []),
    el("b", { class: "raises" }, "raises"), el("b", { class: "lowers" }, "lowers"));
}
