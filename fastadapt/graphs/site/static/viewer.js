// Shows the list of graphs, a graph, or the page of a feature. The address holds the state:
// "#/graph?node=…&pins=…&group=…&nodes=…&edges=…", "#/graph/layer/feature?…".
"use strict";

const DEFAULTS = { nodes: 85, edges: 80 }; // percent of the influence
const current = { graph: null, unit: null, node: null, pins: [], groups: [], ...DEFAULTS };
const graphs = new Map(); // index to a promise of a Graph
const all = new Set(); // lists of edges that are shown in full
let listed = null; // facts of the graphs
let site = null; // facts of the store, or null
let units = null;
let tokens = null;
let graph = null;
let shortWindows = true;
let visits = 0; // number of address changes; data that arrive after a later change are ignored

function parse(hash) {
  const [path, query = ""] = hash.replace(/^#\/?/, "").split("?", 2);
  const parts = path.split("/").filter(Boolean);
  const number = (text) => (/^\d{1,9}$/.test(text) ? Number(text) : NaN);
  const numbers = (text) => (text ?? "").split(".").map(number).filter((value) => value >= 0);
  const out = { graph: null, unit: null, node: null, pins: [], groups: [], ...DEFAULTS };
  if (!parts.length) return listed.graphs.length === 1 ? { ...out, graph: 0, ...state(query, out) } : out;
  out.graph = number(parts[0]);
  if (!(out.graph < listed.graphs.length) || ![1, 3].includes(parts.length)) {
    throw new Error(`No graph ${inlineText(parts.join("/"))}: expected 0 to ${listed.graphs.length - 1}.`);
  }
  if (parts.length === 3) {
    const [layer, feature] = parts.slice(1).map(number);
    if (!units || !(layer < units.layers) || !(feature < units.features)) {
      throw new Error(`No page of feature ${inlineText(parts.slice(1).join("/"))}.`);
    }
    out.unit = layer * units.features + feature;
  }
  return { ...out, ...state(query, out) };

  function state(text, initial) {
    const query = new URLSearchParams(text);
    const percent = (name) => (query.has(name) ? Math.min(100, number(query.get(name)) || 0) : initial[name]);
    const pins = [...new Set(numbers(query.get("pins")))];
    const groups = query.getAll("group").map((group) => {
      const [, items, name] = /^([\d.]*)(?::(.*))?$/su.exec(group) ?? [null, "", ""];
      return { name: name || "group", items: numbers(items) };
    });
    const node = number(query.get("node") ?? "");
    return { node: node >= 0 ? node : null, pins, groups, nodes: percent("nodes"), edges: percent("edges") };
  }
}

/** Returns the address of the present state, with other values. */
function address(change = {}) {
  const to = { ...current, ...change };
  if (to.graph === null) return "#/";
  const query = new URLSearchParams();
  if (to.node !== null) query.set("node", to.node);
  if (to.pins.length) query.set("pins", to.pins.join("."));
  to.groups.forEach(({ name, items }) => query.append("group", `${items.join(".")}:${name}`));
  for (const [name, initial] of Object.entries(DEFAULTS)) if (to[name] !== initial) query.set(name, to[name]);
  const path = to.unit === null ? [to.graph]
    : [to.graph, Math.floor(to.unit / units.features), to.unit % units.features];
  return `#/${path.join("/")}${query.size ? `?${query}` : ""}`;
}

/** Changes the state without an entry in the history, and draws it. */
function change(values) {
  history.replaceState(null, "", address(values));
  route();
}

function select(item) {
  if (item === current.node) return change({ node: null });
  location.hash = address({ node: item });
}

function pin(item) {
  setPins(current.pins.includes(item) ? current.pins.filter((other) => other !== item) : [...current.pins, item]);
  change({});
}

/** Sets the pins, and leaves the others out of the groups. */
function setPins(pins) {
  current.pins = pins;
  current.groups = current.groups
    .map(({ name, items }) => ({ name, items: items.filter((item) => pins.includes(item)) }))
    .filter(({ items }) => items.length);
}

async function route() {
  const visit = ++visits;
  try {
    Object.assign(current, parse(location.hash));
    showError(null);
    if (current.graph === null) return showGraphs();
    const loaded = await readGraph(current.graph);
    if (visit !== visits) return;
    graph = loaded;
    if (current.node >= graph.items.length) current.node = null;
    setPins(current.pins.filter((item) => item < graph.n));
    if (current.unit !== null) await showFeature(visit);
    else await showGraph(visit);
  } catch (error) {
    if (visit === visits) showError(error);
  }
}

function readGraph(index) {
  if (!graphs.has(index)) graphs.set(index, fastadapt.load(`graph-${index}`).then(({ facts }) => new Graph(facts)));
  return graphs.get(index);
}

function show(name) {
  for (const main of ["graphs", "graph", "feature"]) document.getElementById(main).hidden = main !== name;
  document.body.dataset.view = name;
  const links = [];
  if (name === "feature") links.push(el("a", { class: "quiet", href: address({ unit: null }), "aria-keyshortcuts": "Escape" }, "← graph"));
  if (name !== "graphs" && listed.graphs.length > 1) links.push(el("a", { class: "quiet", href: "#/" }, "All graphs"));
  document.getElementById("places").replaceChildren(...links);
}

function drawTitle(title, note) {
  document.getElementById("title").textContent = title;
  document.getElementById("subtitle").textContent = note;
  document.title = `${title} · fastadapt`;
}

function showGraphs() {
  const rows = listed.graphs.map((facts, i) => {
    const out = el("tr", {}, el("td", {}, el("a", { href: `#/${i}` }, inlineText(facts.explains))));
    [`${tokenText(facts.token)} @${facts.position}`, formatNumber(facts.value), facts.stream,
      formatInteger(facts.tokens), formatInteger(facts.features), formatPercent(facts.replacement), inlineText(facts.name),
    ].forEach((text) => out.append(el("td", {}, text)));
    return out;
  });
  const head = ["explains", "after", "value", "stream", "tokens", "features", "replacement", "file"];
  document.getElementById("graphs").replaceChildren(el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, ...head.map((text) => el("th", {}, text)))), el("tbody", {}, ...rows))));
  drawTitle(`${formatInteger(rows.length)} graphs`, "");
  show("graphs");
  markDrawn("graphs");
}

function drawGraphTitle() {
  const { file } = graph;
  const [row] = file.rows;
  const name = (path) => inlineText(String(path).split("/").pop());
  drawTitle(inlineText(row.name), `after ${tokenText(graph.token(row.position))} (position ${row.position} of ` +
    `${formatInteger(file.ids.length)}) · value ${formatNumber(row.value)} · stream ${file.stream} · ` +
    `${name(file.models.target)} against ${name(file.models.base)}`);
}

async function showGraph(visit) {
  drawGraphTitle();
  show("graph");
  if (showGraph.drawn !== graph) {
    drawLegend(document.getElementById("legend"), graph);
    drawEvidence(document.getElementById("evidence"), graph);
    document.getElementById("picture").replaceChildren();
    showGraph.drawn = graph;
  }
  if (showGraph.node !== current.node) all.clear();
  showGraph.node = current.node;
  draw();
  markDrawn("graph");
  if (!units) return;
  const layers = new Set(graph.items.filter(({ kind }) => kind === "feature").map(({ layer }) => layer));
  [tokens] = await Promise.all([readTokens(), ...[...layers].map((layer) => units.layer(layer))]);
  if (visit !== visits) return;
  drawDetails();
  markDrawn("features");
}

/** Draws the picture and what belongs to its state. */
function draw() {
  const pinned = new Set(current.pins);
  const always = current.node === null ? current.pins : [...current.pins, current.node];
  const items = graph.visible(current.nodes / 100, always);
  const edges = graph.edges(items, current.edges / 100);
  const form = document.getElementById("thresholds");
  for (const name of ["nodes", "edges"]) form.elements[name].value = current[name];
  const shown = [...items].filter((item) => !graph.isTarget(item)).length;
  form.elements["nodes-out"].value = `${current.nodes}%, ${formatInteger(shown)} of ${formatInteger(graph.n)}`;
  form.elements["edges-out"].value = `${current.edges}%, ${formatInteger(edges.length)}`;
  drawPicture(document.getElementById("picture"), { graph, items, edges, selected: current.node, pinned, select });
  drawDetails();
}

function drawDetails() {
  const context = { graph, units, tokens, select, pin, all, item: current.node, pinned: new Set(current.pins), redraw: drawDetails };
  context.page = (item) => {
    const { kind, layer, feature } = graph.items[item];
    return units && kind === "feature" ? address({ unit: layer * units.features + feature }) : null;
  };
  drawPanel(document.getElementById("panel"), context);
  drawGroups(document.getElementById("groups"), groupContext());
}

function groupContext() {
  return { graph, units, select, pins: current.pins, groups: current.groups, change: (pins, groups) => change({ pins, groups }) };
}

async function showFeature(visit) {
  const layer = Math.floor(current.unit / units.features);
  const feature = current.unit % units.features;
  const [shard, texts, vocabulary] = await Promise.all(
    [fastadapt.load(`adapter-${layer}-${feature}`, true), readTexts(), readTokens(), units.layer(layer)]);
  if (visit !== visits) return;
  tokens = vocabulary;
  const main = document.getElementById("feature");
  drawFeature(main, { units, unit: current.unit, site, tokens, texts, shard, short: shortWindows });
  const toggle = document.getElementById("window");
  const label = () => (toggle.textContent = shortWindows ? "Whole windows" : "Short windows");
  toggle.onclick = () => {
    shortWindows = !shortWindows;
    main.classList.toggle("short", shortWindows);
    label();
  };
  label();
  drawGraphTitle();
  show("feature");
  scrollTo(0, 0);
  main.focus({ preventScroll: true });
  markDrawn("feature");
}

/** Selects the next or the previous visible node by influence. */
function step(by) {
  const items = graph.order.filter((item, i) => graph.share[i - 1] === undefined || graph.share[i - 1] < current.nodes / 100 || item === current.node);
  const index = items.indexOf(current.node);
  const next = index < 0 ? (by > 0 ? 0 : items.length - 1) : index + by;
  if (next >= 0 && next < items.length) change({ node: items[next] });
}

/** Selects the strongest input or output of the selected node, or the target. */
function follow(end) {
  if (current.node === null) return change({ node: graph.n });
  const edges = end === "source" ? graph.inputs.get(current.node) : graph.outputs.get(current.node);
  const best = (edges ?? []).reduce((a, b) => (a && a.flow >= b.flow ? a : b), null);
  if (best) change({ node: best[end] });
}

function onKey(event) {
  const dialog = document.getElementById("help");
  if (dialog.open || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input:not([type=range]), select, textarea")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const nudge = (name, by) => change({ [name]: Math.min(100, Math.max(0, current[name] + by)) });
  const onGraph = current.graph !== null && current.unit === null && graph !== null;
  const actions = {
    j: () => step(1), k: () => step(-1), ArrowDown: () => follow("source"), ArrowUp: () => follow("target"),
    p: () => current.node !== null && !graph.isTarget(current.node) && pin(current.node),
    g: () => groupPins(groupContext()),
    "[": () => nudge("nodes", -5), "]": () => nudge("nodes", 5), "{": () => nudge("edges", -5), "}": () => nudge("edges", 5),
  };
  if (event.key === "?") dialog.showModal();
  else if (event.key === "Escape" && current.unit !== null) location.hash = address({ unit: null });
  else if (event.key === "Escape" && current.node !== null) change({ node: null });
  else if (event.key === "Escape" && listed.graphs.length > 1) location.hash = "#/";
  else if (onGraph && event.key === "Enter" && !event.target.closest("button, a")) document.getElementById("open")?.click();
  else if (onGraph && event.key in actions && !(event.target.matches("input") && event.key.startsWith("Arrow"))) actions[event.key]();
  else return;
  event.preventDefault();
}

async function start() {
  document.addEventListener("keydown", onKey);
  const help = document.getElementById("help");
  document.getElementById("help-button").addEventListener("click", () => help.showModal());
  document.getElementById("picture").addEventListener("click", () => current.node !== null && change({ node: null }));
  document.getElementById("thresholds").addEventListener("input", ({ target }) => change({ [target.name]: Number(target.value) }));
  enableTooltips();
  try {
    listed = (await fastadapt.load("graphs")).facts;
    if (listed.features) {
      site = (await fastadapt.load("site")).facts;
      units = new Units(site.kinds[0]);
    }
  } catch (error) {
    return showError(error);
  }
  addEventListener("hashchange", route);
  let frame = 0;
  addEventListener("resize", () => {
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(() => graph && document.body.dataset.view === "graph" && draw());
  });
  return route();
}

start();
