// Draws the panel of the selected item: facts, inputs with their heads, outputs.
"use strict";

const LISTED = 12; // edges in a list before the button for all of them
const LEAST_HEAD = 0.05; // share of an edge from which a head is named

/**
 * Draws the panel. context: graph, item or null, pinned (Set), units (Units or null), tokens,
 * select, pin (called with an item), page (returns the address of a feature's page), all (Set of
 * lists that are shown in full), redraw.
 */
function drawPanel(box, context) {
  const { graph, item } = context;
  if (item === null) {
    box.replaceChildren(card("Selected node", "", el("p", { class: "none" },
      "Select a node in the picture, or press j for the one with the most influence.")), strongest(context));
    return;
  }
  const node = graph.items[item];
  const row = graph.rows.get(item);
  const isTarget = graph.isTarget(item);
  const buttons = el("p", { class: "buttons" });
  if (!isTarget) {
    buttons.append(el("button", {
      class: "quiet", type: "button", id: "pin", "aria-keyshortcuts": "p", "aria-pressed": context.pinned.has(item),
      on: { click: () => context.pin(item) },
    }, context.pinned.has(item) ? "Release" : "Pin"));
  }
  const address = context.page(item);
  if (address) buttons.append(el("a", { class: "quiet", href: address, id: "open", "aria-keyshortcuts": "Enter" }, "Page of the feature"));
  const head = el("section", { class: "card", "aria-label": "Selected node" },
    el("h2", {}, graph.name(item)),
    el("p", { class: "note" }, isTarget ? "after " : "at ", tokenChip(graph.token(node.position)), ` position ${node.position}`),
    ...said(context, node), facts(context, item), buttons);
  const lists = [];
  if (row) lists.push(edgeList(context, "inputs", "Inputs", graph.inputs.get(item), "source", row));
  else lists.push(card("Inputs", "", el("p", { class: "none" }, ended(node))));
  if (!isTarget) lists.push(edgeList(context, "outputs", "Outputs", graph.outputs.get(item) ?? [], "target", null));
  box.replaceChildren(head, ...lists);
}

function card(title, note, ...content) {
  return el("section", { class: "card", "aria-label": title },
    el("header", {}, el("h3", {}, title), el("span", {}, note)), ...content);
}

function ended({ kind }) {
  return UNIT_KINDS.includes(kind) ? "This node was not expanded: its influence counts as pruned." : "None: influence ends here.";
}

/** Returns what the store says of a feature in one line: its description, or promoted tokens. */
function saying({ units, tokens }, { kind, layer, feature }) {
  if (kind !== "feature" || !units?.ready[layer]) return null;
  const unit = layer * units.features + feature;
  if (units.description[unit] !== undefined) return inlineText(units.description[unit]);
  const texts = units.promotedOf(unit).slice(0, 4).map((token) => tokenText(tokens.text(token)));
  return texts.length ? `promotes ${texts.join(", ")}` : null;
}

/** Draws a line for an item, which selects it. */
function itemLine(context, item, size, sign, number, tip) {
  const { graph, select } = context;
  const text = saying(context, graph.items[item]);
  return el("button", {
    type: "button", class: "edge-line", "data-item": item, "data-tip": tip, on: { click: () => select(item) },
  }, el("span", { class: "label" }, graph.name(item), " ", tokenChip(graph.token(graph.items[item].position))),
  el("i", { class: sign < 0 ? "lowers" : "raises", style: { "--size": size } }), el("b", {}, number),
  text ? el("bdi", { class: "saying" }, text) : null);
}

/** Draws what the store says of a feature: its description and the tokens that it promotes. */
function said({ units, tokens }, { kind, layer, feature }) {
  if (kind !== "feature" || !units?.ready[layer]) return [];
  const unit = layer * units.features + feature;
  const out = [];
  if (units.description[unit] !== undefined) {
    out.push(el("p", { class: "description", dir: "auto" }, inlineText(units.description[unit])));
  }
  const chips = units.promotedOf(unit).slice(0, 6).map((token) => tokenChip(tokens.text(token)));
  if (chips.length) out.push(el("p", { class: "chips" }, el("span", { class: "note" }, "promotes "), ...chips));
  return out;
}

function facts({ graph }, item) {
  const { kind, influence, activation } = graph.items[item];
  const row = graph.rows.get(item);
  const list = el("dl", { class: "facts" });
  const add = (name, text, tip) => list.append(el("dt", { "data-tip": tip }, name), el("dd", {}, text));
  if (kind === "target") {
    add("value", formatNumber(activation));
    const logits = graph.file.logits?.[item - graph.n] ?? [];
    for (const { string, probability } of logits) add(`p of ${tokenText(string)}`, formatPercent(probability));
    if (row.size) add("from position 0", formatPercent(row.first_position / row.size), "share of the edges");
  } else {
    const signed = graph.signed[item];
    add("influence", formatPercent(influence), "share of the target that flows through the node");
    add("over all paths", `${signed < 0 ? "lowers" : "raises"} by ${formatPercent(Math.abs(signed))}`, "sum of signed paths; paths of both signs cancel");
    if (UNIT_KINDS.includes(kind)) add("activation", formatNumber(activation));
    if (graph.effects.has(item)) add("measured effect", signedNumber(graph.effects.get(item)), "change of the target when the feature is removed here");
  }
  return list;
}

function signedPercent(share) {
  return `${share < 0 ? "−" : ""}${formatPercent(Math.abs(share))}`;
}

function signedNumber(value) {
  return `${value > 0 ? "+" : ""}${formatNumber(value)}`;
}

/** Draws edges to or from an item. */
function edgeList(context, key, title, edges, end, row) {
  const { graph, all } = context;
  const order = [...edges].sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
  if (end === "target") order.sort((a, b) => b.flow - a.flow);
  const size = (edge) => (end === "source" ? Math.abs(edge.weight) : edge.flow);
  const largest = Math.max(...order.map(size), 1e-300);
  const shown = all.has(key) ? order : order.slice(0, LISTED);
  const list = el("ol", { class: "edges" });
  for (const edge of shown) {
    const other = edge[end];
    const heads = end === "source" && graph.isTarget(edge.target) ? graph.heads.get(other) : null;
    const tip = `${graph.fullName(other)} · edge ${signedNumber(edge.weight)} · ${formatPercent(edge.flow)} of the target`;
    const line = itemLine(context, other, size(edge) / largest, edge.weight, signedNumber(edge.weight), tip);
    const text = heads ? headText(heads, edge.weight) : "";
    list.append(el("li", {}, line, text ? el("span", { class: "heads" }, text) : null));
  }
  const children = [list];
  if (order.length > LISTED) {
    const toggle = () => { all.has(key) ? all.delete(key) : all.add(key); context.redraw(); };
    children.push(el("button", { class: "quiet more", type: "button", on: { click: toggle } },
      all.has(key) ? "Fewer" : `All ${formatInteger(order.length)}`));
  }
  if (row) {
    const parts = [`not stored: ${signedNumber(row.remainder)}`];
    if (row.constant) parts.unshift(`constant: ${signedNumber(row.constant)}`);
    children.push(el("p", { class: "note" }, `${parts.join(", ")}. All sum to ${formatNumber(row.value)}.`));
  }
  if (!order.length) children.splice(0, 1, el("p", { class: "none" }, "No stored edge."));
  return card(title, end === "source" ? "edge" : "by influence on the target", ...children);
}

/** Returns the last heads on the paths of an edge, with their shares of it. */
function headText({ direct, heads }, weight) {
  const loads = heads.filter(([, , part]) => Math.abs(part) >= LEAST_HEAD * Math.abs(weight));
  loads.sort((a, b) => Math.abs(b[2]) - Math.abs(a[2]));
  if (!loads.length) return "";
  const texts = loads.slice(0, 4).map(([layer, head, part]) => `head ${layer}.${head} ${signedPercent(part / weight)}`);
  if (Math.abs(direct) >= LEAST_HEAD * Math.abs(weight)) texts.push(`no head ${signedPercent(direct / weight)}`);
  return texts.join(", ");
}

function strongest(context) {
  const { graph } = context;
  const first = graph.order.slice(0, LISTED);
  const largest = graph.items[first[0]]?.influence ?? 1;
  const lines = first.map((item) => {
    const { influence } = graph.items[item];
    return el("li", {}, itemLine(context, item, influence / largest, graph.signed[item], formatPercent(influence), graph.fullName(item)));
  });
  return card("Most influence", "share of the target", el("ol", { class: "edges" }, ...lines));
}
