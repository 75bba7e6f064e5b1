// What the address asks for is shown; keys; the tip.
"use strict";

// Of the address: "#/kind/layer/feature?filters", without the kind where it is the first, and
// without the unit where it is the list.
const here = { kind: null, unit: null, query: "" };
const kinds = new Map(); // Units by kind
let site = null;
let tokens = null;
let list = null;
let shortWindows = true;
let asked = 0; // addresses so far: what comes late for an older one is not shown
let listSeen = false;
let searching = false; // the list was asked for to search in it

function address(kind, layer = null, feature = null) {
  const parts = kind === site.kinds[0].kind ? [] : [kind];
  if (layer !== null) parts.push(layer, feature);
  const query = kind === here.kind && here.query ? `?${here.query}` : "";
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
      throw new Error(`There is no ${unitWord(kind)} ${plain(parts.join("/"))} here: layers 0 to ` +
        `${units.layers - 1}, ${unitWord(kind, 2)} 0 to ${units.features - 1}.`);
    }
    unit = layer * units.features + feature;
  }
  return { kind, unit, query: new URLSearchParams(query).toString() };
}

function trouble(error) {
  const line = document.getElementById("trouble");
  line.textContent = error ? error.message : "";
  line.hidden = !error;
}

async function route() {
  const mine = ++asked;
  const before = { ...here };
  try {
    Object.assign(here, parse(location.hash));
    trouble(null);
  } catch (error) {
    Object.assign(here, { kind: site.kinds[0].kind, unit: null, query: "" });
    trouble(error);
  }
  const units = kinds.get(here.kind);
  const query = new URLSearchParams(here.query);
  const own = here.unit === null ? null : Math.floor(here.unit / units.features);
  const wanted = own ?? Number(query.get("layer"));
  const layer = wanted < units.layers ? wanted : 0;
  const page = here.unit === null ? null : showFeature(units, here.unit, layer, mine);
  page?.catch(() => {}); // told where it is awaited
  try {
    const [read] = await Promise.all([readTokens(), units.layer(layer)]);
    if (mine !== asked) return;
    tokens = read;
    drawKinds();
    list.show(units, site, tokens, query);
    if (here.unit === null) showList(before);
    else {
      await page;
      if (mine === asked) drawPlaces(units, here.unit);
    }
  } catch (error) {
    if (mine === asked) trouble(error);
  }
  readRest(units, layer);
}

function readTokens() {
  readTokens.once ??= fastadapt.load("tokens").then((read) => new Tokens(read));
  return readTokens.once;
}

function readTexts() {
  readTexts.once ??= fastadapt.load("texts").then(({ facts, columns }) =>
    new Map(Array.from(columns.text, (text, i) => [text, facts.ids[i]])));
  return readTexts.once;
}

/** Reads the layers that are not there yet, one behind the other. */
async function readRest(units, first) {
  if (units.readingRest) return;
  units.readingRest = true;
  let shown = performance.now();
  try {
    for (let i = 1; i < units.layers; i++) {
      await units.layer((first + i) % units.layers);
      if (performance.now() - shown < 250 && !units.whole) continue;
      if (here.kind === units.kind) {
        list.refresh(false);
        if (here.unit !== null) drawPlaces(units, here.unit);
      }
      shown = performance.now();
    }
    performance.mark("whole");
  } catch (error) {
    trouble(error);
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
  if (first) drawn("rows");
  else if (document.activeElement === document.body && before.unit !== null) list.grid.focus({ preventScroll: true });
}

async function showFeature(units, unit, layer, mine) {
  const feature = unit % units.features;
  if (document.body.dataset.view === "list") list.leave();
  const name = `${units.kind}-${layer}-${Math.floor(feature / units.span)}`;
  const [shard, texts, words] = await Promise.all(
    [fastadapt.load(name, true), readTexts(), readTokens(), units.layer(layer)]);
  if (mine !== asked) return;
  tokens = words;
  const main = document.getElementById("feature");
  drawFeature(main, { units, unit, site, tokens, texts, shard, short: shortWindows });
  drawPlaces(units, unit);
  drawToggle();
  show("feature");
  document.title = `Layer ${layer}, ${unitWord(units.kind)} ${feature} · fastadapt`;
  scrollTo(0, 0);
  main.focus({ preventScroll: true });
  drawn("feature");
}

/** Notes the time once what was drawn is on the screen. */
function drawn(name) {
  requestAnimationFrame(() => setTimeout(() => performance.mark(name)));
}

/** Units before and after one: in the list where there was one, else by number. */
function neighbours(units, unit) {
  const at = listSeen || here.query ? list.matches.indexOf(unit) : -1;
  if (at >= 0 && list.units === units) {
    const { matches } = list;
    const place = `${whole(at + 1)} of ${whole(matches.length)} in the list`;
    return { before: matches[at - 1], after: matches[at + 1], place };
  }
  return {
    before: unit > 0 ? unit - 1 : undefined,
    after: unit + 1 < units.n ? unit + 1 : undefined,
    place: "by number",
  };
}

function unitAddress(units, unit) {
  return address(units.kind, Math.floor(unit / units.features), unit % units.features);
}

function drawPlaces(units, unit) {
  const nav = document.querySelector("#feature .places");
  if (!nav) return;
  const { before, after, place } = neighbours(units, unit);
  const link = (to, text, label) =>
    to === undefined
      ? el("span", { class: "quiet off", "aria-hidden": "true" }, text)
      : el("a", { class: "quiet", href: unitAddress(units, to), "aria-label": label }, text);
  nav.replaceChildren(
    el("a", { class: "quiet", href: address(units.kind), "aria-keyshortcuts": "Escape" }, "← list"),
    el("span", { class: "note" }, place),
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
      "aria-current": kind === here.kind ? "page" : null,
    }, KIND_NAMES[kind] ?? kind)));
}

function drawTitle() {
  const name = (path) => plain(String(path).split("/").filter(Boolean).pop() ?? "");
  const { target, base } = site.pair;
  document.getElementById("title").textContent =
    target && base ? `${name(target)} against ${name(base)}` : name(site.run);
  const facts = [["Run", site.run], ["Target", target], ["Base", base]];
  const { texts, tokens: count, source } = site.data;
  facts.push(["Texts", `${whole(texts)}, ${whole(count)} tokens, of ${source}`]);
  facts.push(["Density", "the share of all tokens at which it is active"]);
  facts.push(["Mostly in", "the region of most of its activations"]);
  facts.push(["Highlight", "an activation over its largest one; the token that was kept is underlined"]);
  const about = document.getElementById("about");
  facts.forEach(([key, value]) => about.append(el("dt", {}, key), el("dd", {}, plain(String(value)))));
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
  const go = (unit) => unit !== undefined && (location.hash = unitAddress(kinds.get(here.kind), unit));
  const onPage = here.unit !== null;
  const { before, after } = onPage ? neighbours(kinds.get(here.kind), here.unit) : {};
  if (event.key === "?") dialog.showModal();
  else if (event.key === "/") {
    searching = onPage;
    if (onPage) location.hash = address(here.kind);
    else document.getElementById("q").select();
  } else if (onPage && event.key === "Escape") location.hash = address(here.kind);
  else if (onPage && (event.key === "j" || event.key === "ArrowRight")) go(after);
  else if (onPage && (event.key === "k" || event.key === "ArrowLeft")) go(before);
  else if (onPage && event.key === "w") toggleWindows();
  else if (!onPage && !target.closest("button, a")) return list.key(event);
  else return;
  event.preventDefault();
}

function tips() {
  const tip = document.getElementById("tip");
  document.addEventListener("pointerover", (event) => {
    const owner = event.target.closest?.("[data-tip]");
    tip.hidden = !owner;
    if (!owner) return;
    tip.textContent = owner.dataset.tip;
    const boxes = Array.from(owner.getClientRects()); // one per line that it is on
    const box = boxes.find(({ bottom }) => event.clientY <= bottom) ?? owner.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left), innerWidth - tip.offsetWidth - 8);
    const above = box.top - tip.offsetHeight - 6;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${above > 4 ? above : box.bottom + 6}px`;
  });
  addEventListener("scroll", () => (tip.hidden = true), { passive: true, capture: true });
}

async function start() {
  list = new List((to) => (location.hash = to), (query) => {
    here.query = query.toString();
    history.replaceState(null, "", address(here.kind));
  });
  document.addEventListener("keydown", onKey);
  const help = document.getElementById("help");
  document.getElementById("help-button").addEventListener("click", () => help.showModal());
  tips();
  try {
    readTokens();
    site = (await fastadapt.load("site")).facts;
  } catch (error) {
    return trouble(error);
  }
  site.kinds.forEach((facts) => kinds.set(facts.kind, new Units(facts)));
  drawTitle();
  addEventListener("hashchange", route);
  return route();
}

start();
