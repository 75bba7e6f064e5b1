// A graph as nodes and edges with their influence. An item is a node of the file, by its index, or
// a target, by the number of nodes plus its index.
"use strict";

const KIND_LABELS = {
  feature: "Feature", token: "Token", "decoder bias": "Adapter's bias",
  "attention bias": "Attention bias", "mlp bias": "MLP bias", error: "Error", target: "Target",
  "base feature": "Base feature", "rank component": "Rank component",
};
const UNIT_KINDS = ["feature", "base feature", "rank component"]; // with a number in their layer
const MOST_ITEMS = 400; // drawn in a picture, beside pins
const MOST_EDGES = 2000;

class Graph {
  constructor(file) {
    this.file = file;
    const { nodes, rows, targets } = file;
    this.n = nodes.length;
    this.items = nodes.concat(rows.slice(0, targets).map((row) => ({
      kind: "target", name: row.name, position: row.position, layer: file.n_layers, feature: -1,
      activation: row.value, influence: 1 / targets,
    })));
    this.rows = new Map(rows.map((row, i) => [row.node ?? this.n + i, row]));
    this.inputs = new Map();
    this.outputs = new Map();
    for (const [target, row] of this.rows) {
      const flow = this.items[target].influence / (row.size || 1);
      this.inputs.set(target, row.sources.map((source, i) => {
        const edge = { source, target, weight: row.weights[i], flow: flow * Math.abs(row.weights[i]) };
        if (!this.outputs.has(source)) this.outputs.set(source, []);
        this.outputs.get(source).push(edge);
        return edge;
      }));
    }
    this.outputs.forEach((edges) => edges.sort((a, b) => b.flow - a.flow));
    this.heads = new Map(file.heads.map((edge) => [edge.node, edge]));
    this.effects = new Map();
    for (const sample of file.evidence?.samples ?? []) {
      sample.nodes.forEach((node, i) => this.effects.set(node, sample.effects[i]));
    }
    this.sign();
    this.order = [...nodes.keys()].sort((a, b) => nodes[b].influence - nodes[a].influence);
    this.share = shares(this.order.map((item) => nodes[item].influence));
  }

  /** Sets the signed influence of each item: the sum over paths of the signed shares of edges. */
  sign() {
    this.signed = new Float64Array(this.items.length);
    for (let i = this.n; i < this.items.length; i++) this.signed[i] = this.items[i].influence;
    // A node passes its value on after all its outputs gave theirs. Layers do not give this order:
    // rank components of one layer form chains.
    const waiting = new Map([...this.rows.keys()].map((item) => [item, this.outputs.get(item)?.length ?? 0]));
    const ready = [...this.rows.keys()].filter((item) => waiting.get(item) === 0);
    while (ready.length) {
      const target = ready.pop();
      const size = this.rows.get(target).size || 1;
      for (const { source, weight } of this.inputs.get(target)) {
        this.signed[source] += this.signed[target] * (weight / size);
        if (!waiting.has(source)) continue;
        waiting.set(source, waiting.get(source) - 1);
        if (waiting.get(source) === 0) ready.push(source);
      }
    }
  }

  isTarget(item) {
    return item >= this.n;
  }

  token(position) {
    return this.file.tokens[position];
  }

  /** Returns the name of an item, without its place. */
  name(item) {
    const { kind, layer, feature, name } = this.items[item];
    if (kind === "target") return inlineText(name);
    if (kind === "token") return KIND_LABELS.token;
    return `${KIND_LABELS[kind] ?? kind} ${layer}${UNIT_KINDS.includes(kind) ? `/${feature}` : ""}`;
  }

  /** Returns the name of an item and the token at which it is. */
  fullName(item) {
    const { position } = this.items[item];
    return `${this.name(item)} · ${tokenText(this.token(position))} @${position}`;
  }

  /** Returns the fewest items that have a share of the influence, and those of `always`. */
  visible(share, always) {
    const end = Math.min(MOST_ITEMS, countBelow(this.share, share));
    const out = new Set(this.order.slice(0, end));
    for (let i = this.n; i < this.items.length; i++) out.add(i);
    always.forEach((item) => out.add(item));
    return out;
  }

  /** Returns the fewest edges between items that have a share of these edges' influence. */
  edges(items, share) {
    const all = [];
    for (const target of items) {
      for (const edge of this.inputs.get(target) ?? []) if (items.has(edge.source)) all.push(edge);
    }
    all.sort((a, b) => b.flow - a.flow);
    return all.slice(0, Math.min(MOST_EDGES, countBelow(shares(all.map(({ flow }) => flow)), share)));
  }
}

/** Returns the cumulative shares of values. */
function shares(values) {
  const total = values.reduce((sum, value) => sum + value, 0);
  let sum = 0;
  return values.map((value) => (sum += value) / (total || 1));
}

/** Returns how many of the first entries it takes to reach a share. */
function countBelow(cumulative, share) {
  if (share <= 0) return 0;
  if (share >= 1) return cumulative.length;
  const index = cumulative.findIndex((value) => value >= share - 1e-12);
  return index < 0 ? cumulative.length : index + 1;
}
