// Draws the pinned nodes, alone or in groups, and the influence that flows between them.
"use strict";

const BOX = { width: 168, height: 44, across: 26, up: 46 };
const SHIFT = 56; // of every other line, so that edges past a box stay visible

/**
 * Draws the card of pins. context: graph, pins (array of items), groups (array of {name, items}),
 * units, select, change (called with new pins and groups).
 */
function drawGroups(section, context) {
  const { graph, pins, groups, change } = context;
  section.hidden = pins.length === 0;
  if (section.hidden) return;
  const grouped = new Set(groups.flatMap(({ items }) => items));
  const single = pins.filter((item) => !grouped.has(item));
  const boxes = [
    ...groups.map((group) => ({ ...group, group })),
    ...single.map((item) => ({ name: graph.name(item), items: [item] })),
    ...graph.items.slice(graph.n).map((node, i) => ({ name: inlineText(node.name), items: [graph.n + i] })),
  ];
  const button = (text, keys, click, off = false) =>
    el("button", { class: "quiet", type: "button", "aria-keyshortcuts": keys, disabled: off, on: { click } }, text);
  const rename = (group, i) => el("span", { class: "group" },
    el("input", { value: group.name, "aria-label": `Name of group ${i + 1}`, size: 14,
      on: { change: (event) => change(pins, groups.map((g, k) => (k === i ? { ...g, name: event.target.value } : g))) } }),
    button("Ungroup", null, () => change(pins, groups.filter((_, k) => k !== i))));
  section.replaceChildren(
    el("header", {}, el("h3", {}, `Pinned: ${formatInteger(pins.length)}`), el("span", { class: "buttons" },
      button("Group the single ones", "g", () => groupPins(context), single.length < 2),
      button("Release all", null, () => change([], [])))),
    el("p", { class: "buttons" }, ...groups.map(rename)),
    el("div", { class: "reduced" }, drawReduced(context, boxes)));
}

/** Puts the pins that are in no group into a new one. */
function groupPins({ graph, pins, groups, units, change }) {
  const grouped = new Set(groups.flatMap(({ items }) => items));
  const single = pins.filter((item) => !grouped.has(item));
  if (single.length < 2) return;
  const [first] = single;
  const { kind, layer, feature } = graph.items[first];
  const known = kind === "feature" ? units?.description[layer * units.features + feature] : null;
  change(pins, [...groups, { name: known ? inlineText(known).slice(0, 40) : `group ${groups.length + 1}`, items: single }]);
}

/** Draws a box per group or single pin, and the flow between boxes. */
function drawReduced({ graph, select }, boxes) {
  const mean = ({ items }) => items.reduce((sum, item) => sum + graph.items[item].layer, 0) / items.length;
  const lines = new Map();
  boxes.forEach((box) => {
    const layer = Math.round(mean(box));
    if (!lines.has(layer)) lines.set(layer, []);
    lines.get(layer).push(box);
  });
  const order = [...lines.keys()].sort((a, b) => b - a);
  const most = Math.max(...[...lines.values()].map((line) => line.length));
  const width = most * (BOX.width + BOX.across) + BOX.across + 2 * SHIFT;
  order.forEach((layer, i) => {
    const line = lines.get(layer).sort((a, b) => graph.items[a.items[0]].position - graph.items[b.items[0]].position);
    line.forEach((box, k) => {
      box.x = (width - line.length * (BOX.width + BOX.across) + BOX.across) / 2 + k * (BOX.width + BOX.across) + (i % 2 ? SHIFT : -SHIFT);
      box.y = 4 + i * (BOX.height + BOX.up);
    });
  });
  const height = order.length * (BOX.height + BOX.up) - BOX.up + 8;
  const svg = el("svg", { width, height, viewBox: `0 0 ${width} ${height}` });
  const flows = between(graph, boxes);
  const largest = Math.max(...flows.map(({ flow }) => flow), 1e-300);
  for (const { from, to, flow, signed } of flows) {
    const [x, y, u, v] = [from.x + BOX.width / 2, from.y, to.x + BOX.width / 2, to.y + BOX.height];
    const bend = Math.max(20, Math.abs(y - v) / 2);
    const path = el("path", { class: `edge near ${signed < 0 ? "lowers" : "raises"}`, d: `M${x} ${y}C${x} ${y - bend} ${u} ${v + bend} ${u} ${v}` });
    path.style.setProperty("stroke-width", String(0.8 + 5 * Math.sqrt(flow / largest)));
    path.dataset.tip = `${from.name} → ${to.name}: ${formatPercent(flow)} of the target`;
    svg.append(path);
  }
  for (const box of boxes) {
    const sum = box.items.reduce((total, item) => total + graph.items[item].influence, 0);
    const isTarget = graph.isTarget(box.items[0]);
    const text = box.name.length > 24 ? `${box.name.slice(0, 23)}…` : box.name;
    const { position } = graph.items[box.items[0]];
    const count = box.items.length > 1 ? `${box.items.length} nodes` : `${tokenText(graph.token(position))} @${position}`;
    const group = el("g", { class: "box", role: "button", "aria-label": box.name, on: { click: () => select(box.items[0]) } },
      el("rect", { x: box.x, y: box.y, width: BOX.width, height: BOX.height, rx: 8 }),
      el("text", { x: box.x + 10, y: box.y + 18, class: "name" }, text),
      el("text", { x: box.x + 10, y: box.y + 35, class: "count" }, isTarget ? count : `${count} · ${formatPercent(sum)}`));
    group.dataset.tip = box.items.map((item) => graph.fullName(item)).slice(0, 8).join("; ");
    svg.append(group);
  }
  return svg;
}

/** Returns the influence that flows along single edges from each box to each other one. */
function between(graph, boxes) {
  const owner = new Map(boxes.flatMap((box) => box.items.map((item) => [item, box])));
  const flows = new Map();
  for (const to of boxes) {
    for (const edge of to.items.flatMap((item) => graph.inputs.get(item) ?? [])) {
      const from = owner.get(edge.source);
      if (!from || from === to) continue;
      if (!flows.has(from)) flows.set(from, new Map());
      const sum = flows.get(from).get(to) ?? { from, to, flow: 0, signed: 0 };
      sum.flow += edge.flow;
      sum.signed += Math.sign(edge.weight) * edge.flow;
      flows.get(from).set(to, sum);
    }
  }
  return [...flows.values()].flatMap((ends) => [...ends.values()]);
}
