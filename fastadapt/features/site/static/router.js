// Shows the list or the unit of the address. Handles keys and tooltips.
"use strict";

// The address, "#/kind/layer/feature?filters": without the kind if it is the first one, without
// layer and feature for the list.
const current = { kind: null, unit: null, query: "" };
const kinds = new Map(); // Units by kind
let site = null;
let tokens = null;
let list = null;
let shortWindows = true;
let visits = 0; // number of address changes; data that arrive after a later change are ignored
let listSeen = false;
let searching = false; // whether to focus the search field when the list is shown

function address(kind, layer = null, feature = null) {
  const parts = kind === site.kinds[0].kind ? [] : [kind];
  if (layer !== null) parts.push(layer, feature);
  const query = kind === current.kind && current.query ? `?${current.query}` : "";
  return `#/${parts.join("/")}${query}`;
}

function parse(hash) {
  const [path, query = ""] = hash.replace(/^#\/?/, "").split("?", 2);
  const parts = path.split("/").filter(Boolean);
  const kind = kinds.has(parts[0]) ? parts.shift() : site.kinds[0].kind;
  const units = kinds.get(kind);
  let unit = null;
  if (parts.length) {
    const [layer, feature] = parts.map((part) => (/^\d{1,9}$/.test(part) ? Number(part) : NaN));
    if (parts.length !== 2 || !(layer < units.layers) || !(feature < units.features)) {
      throw new Error(`No ${unitNoun(kind)} ${inlineText(parts.join("/"))}: expected layers 0 to ` +
        `${units.layers - 1}, ${unitNoun(kind, 2)} 0 to ${units.features - 1}.`);
    }
    unit = layer * units.features + feature;
  }
  return { kind, unit, query: new URLSearchParams(query).toString() };
}

async function route() {
  const visit = ++visits;
  const before = { ...current };
  try {
    Object.assign(current, parse(location.hash));
    showError(null);
  } catch (error) {
    Object.assign(current, { kind: site.kinds[0].kind, unit: null, query: "" });
    showError(error);
  }
  const units = kinds.get(current.kind);
  const query = new URLSearchParams(current.query);
  const wanted = current.unit === null ? Number(query.get("layer")) : Math.floor(current.unit / units.features);
  const layer = wanted < units.layers ? wanted : 0;
  const page = current.unit === null ? null : showFeature(units, current.unit, layer, visit);
  page?.catch(() => {}); // errors are reported where the promise is awaited
  try {
    const [vocabulary] = await Promise.all([readTokens(), units.layer(layer)]);
    if (visit !== visits) return;
    tokens = vocabulary;
    drawKinds();
    list.show(units, site, tokens, query);
    if (current.unit === null) showList(before);
    else {
      await page;
      if (visit === visits) drawNeighbours(units, current.unit);
    }
  } catch (error) {
    if (visit === visits) showError(error);
  }
  readAll(units, layer);
}

/** Reads all layers, one after the other, from the one after `first`. Runs once per kind. */
async function readAll(units, first) {
  if (units.readingAll) return;
  units.readingAll = true;
  let shown = performance.now();
  try {
    for (let i = 1; i < units.layers; i++) {
      await units.layer((first + i) % units.layers);
      if (performance.now() - shown < 250 && !units.whole) continue;
      if (current.kind === units.kind) {
        list.refresh(false);
        if (current.unit !== null) drawNeighbours(units, current.unit);
      }
      shown = performance.now();
    }
    performance.mark("whole");
  } catch (error) {
    showError(error);
  }
}

function show(name) {
  for (const main of ["list", "feature"]) document.getElementById(main).hidden = main !== name;
  document.body.dataset.view = name;
}

function showList(before) {
  const first = !listSeen;
  listSeen = true;
  show("list");
  document.title = `${document.getElementById("title").textContent} · fastadapt`;
  list.resume(before.unit);
  if (searching) document.getElementById("q").select();
  searching = false;
  if (first) markDrawn("rows");
  else if (document.activeElement === document.body && before.unit !== null) list.grid.focus({ preventScroll: true });
}

async function showFeature(units, unit, layer, visit) {
  const feature = unit % units.features;
  if (document.body.dataset.view === "list") list.leave();
  const name = `${units.kind}-${layer}-${Math.floor(feature / units.span)}`;
  const [shard, texts, vocabulary] = await Promise.all(
    [fastadapt.load(name, true), readTexts(), readTokens(), units.layer(layer)]);
  if (visit !== visits) return;
  tokens = vocabulary;
  const main = document.getElementById("feature");
  drawFeature(main, { units, unit, site, tokens, texts, shard, short: shortWindows });
  drawNeighbours(units, unit);
  drawToggle();
  show("feature");
  document.title = `Layer ${layer}, ${unitNoun(units.kind)} ${feature} · fastadapt`;
  scrollTo(0, 0);
  main.focus({ preventScroll: true });
  markDrawn("feature");
}

/** Returns the previous and the next unit: in the list if it was shown or filtered, else by number. */
function neighbours(units, unit) {
  const row = listSeen || current.query ? list.matches.indexOf(unit) : -1;
  if (row >= 0 && list.units === units) {
    const { matches } = list;
    const order = `${formatInteger(row + 1)} of ${formatInteger(matches.length)} in the list`;
    return { before: matches[row - 1], after: matches[row + 1], order };
  }
  return {
    before: unit > 0 ? unit - 1 : undefined,
    after: unit + 1 < units.n ? unit + 1 : undefined,
    order: "by number",
  };
}

function unitAddress(units, unit) {
  return address(units.kind, Math.floor(unit / units.features), unit % units.features);
}

function drawNeighbours(units, unit) {
  const nav = document.querySelector("#feature .places");
  if (!nav) return;
  const { before, after, order } = neighbours(units, unit);
  const link = (to, text, label) =>
    to === undefined
      ? el("span", { class: "quiet off", "aria-hidden": "true" }, text)
      : el("a", { class: "quiet", href: unitAddress(units, to), "aria-label": label }, text);
  nav.replaceChildren(
    el("a", { class: "quiet", href: address(units.kind), "aria-keyshortcuts": "Escape" }, "← list"),
    el("span", { class: "note" }, order),
    link(before, "‹ previous", "Previous"),
    link(after, "next ›", "Next"),
  );
}

function drawToggle() {
  const button = document.getElementById("window");
  button.textContent = shortWindows ? "Whole windows" : "Short windows";
  button.onclick = toggleWindows;
}

function toggleWindows() {
  shortWindows = !shortWindows;
  document.getElementById("feature").classList.toggle("short", shortWindows);
  drawToggle();
}

function drawKinds() {
  const nav = document.getElementById("kinds");
  nav.hidden = site.kinds.length < 2;
  nav.replaceChildren(...site.kinds.map(({ kind }) =>
    el("a", {
      class: "quiet",
      href: address(kind),
      "aria-current": kind === current.kind ? "page" : null,
    }, KIND_NAMES[kind] ?? kind)));
}

function drawTitle() {
  const name = (path) => inlineText(String(path).split("/").filter(Boolean).pop() ?? "");
  const { target, base } = site.pair;
  document.getElementById("title").textContent =
    target && base ? `${name(target)} against ${name(base)}` : name(site.run);
  const facts = [["Run", site.run], ["Target", target], ["Base", base]];
  const { texts, tokens: count, source } = site.data;
  facts.push(["Texts", `${formatInteger(texts)}, ${formatInteger(count)} tokens, from ${source}`]);
  facts.push(["Density", "share of all tokens at which the unit is active"]);
  facts.push(["Mostly in", "region with most of the unit's activations"]);
  facts.push(["In the base", "of what the MLPs write along the feature where it fires, how much the base's writes; negative: the opposite"]);
  facts.push(["Highlight", "activation divided by the unit's maximum; the example's token is underlined"]);
  const about = document.getElementById("about");
  facts.forEach(([key, value]) => about.append(el("dt", {}, key), el("dd", {}, inlineText(String(value)))));
}

function onKey(event) {
  const dialog = document.getElementById("help");
  if (dialog.open || event.ctrlKey || event.metaKey || event.altKey) return;
  const target = event.target;
  if (target.matches("input, select, textarea")) {
    if (event.key === "Escape" || (event.key === "Enter" && target.name === "q")) {
      list.grid.focus();
      if (event.key === "Enter") list.choose(0);
      event.preventDefault();
    }
    return;
  }
  const go = (unit) => unit !== undefined && (location.hash = unitAddress(kinds.get(current.kind), unit));
  const onPage = current.unit !== null;
  const { before, after } = onPage ? neighbours(kinds.get(current.kind), current.unit) : {};
  if (event.key === "?") dialog.showModal();
  else if (event.key === "/") {
    searching = onPage;
    if (onPage) location.hash = address(current.kind);
    else document.getElementById("q").select();
  } else if (onPage && event.key === "Escape") location.hash = address(current.kind);
  else if (onPage && (event.key === "j" || event.key === "ArrowRight")) go(after);
  else if (onPage && (event.key === "k" || event.key === "ArrowLeft")) go(before);
  else if (onPage && event.key === "w") toggleWindows();
  else if (!onPage && !target.closest("button, a")) return list.key(event);
  else return;
  event.preventDefault();
}

async function start() {
  list = new List((to) => (location.hash = to), (query) => {
    current.query = query.toString();
    history.replaceState(null, "", address(current.kind));
  });
  document.addEventListener("keydown", onKey);
  const help = document.getElementById("help");
  document.getElementById("help-button").addEventListener("click", () => help.showModal());
  enableTooltips();
  try {
    readTokens();
    site = (await fastadapt.load("site")).facts;
  } catch (error) {
    return showError(error);
  }
  site.kinds.forEach((facts) => kinds.set(facts.kind, new Units(facts)));
  drawTitle();
  addEventListener("hashchange", route);
  return route();
}

start();
