// The page of one unit.
"use strict";

const BEFORE = 20; // tokens of a short window on either side of the one that was kept
const AFTER = 10;

/** A unit's part of a shard. */
function detailOf({ facts, columns }, row) {
  if (!columns.offsets) {
    const sums = (lengths) => {
      const out = new Float64Array(lengths.length + 1);
      lengths.forEach((length, i) => (out[i + 1] = out[i] + length));
      return out;
    };
    columns.offsets = {
      example: sums(columns.examples),
      window: sums(columns.example_tokens ?? []),
      fires: sums(columns.example_fires ?? []),
    };
  }
  const n = columns.examples.length;
  const rowOf = (name) => {
    const width = (columns[name]?.length ?? 0) / n;
    return Array.from(columns[name]?.subarray(row * width, (row + 1) * width) ?? []);
  };
  const { example, window, fires } = columns.offsets;
  const examples = [];
  for (let i = example[row]; i < example[row + 1]; i++) {
    const tokens = columns.window_token.subarray(window[i], window[i + 1]);
    const values = new Float32Array(tokens.length);
    for (let f = fires[i]; f < fires[i + 1]; f++) values[columns.fires_at[f]] = columns.fires_value[f];
    const of = (name) => columns[`example_${name}`][i];
    examples.push({
      tokens, values, sample: of("sample"), text: of("text"), position: of("position"),
      start: of("start"), value: of("value"), region: of("region"), domain: of("domain"),
    });
  }
  const names = ["histogram", "by_domain", "by_region", "by_tenth", "promoted_logits",
    "suppressed", "suppressed_logits"];
  const out = { examples, mean: columns.mean[row], norm: columns.norm[row] };
  names.forEach((name) => (out[name] = rowOf(name)));
  return out;
}

/** Draws the page into `main`. all: {units, unit, site, tokens, texts, shard, short}. */
function drawFeature(main, all) {
  const { units, unit, site, tokens, texts, shard } = all;
  const layer = Math.floor(unit / units.features);
  const feature = unit % units.features;
  const detail = detailOf(shard, feature % units.span);
  const notes = shard.facts.notes[feature] ?? {};
  const max = units.max[unit];
  const head = el("header", { class: "unit" },
    el("h2", {}, `Layer ${layer}, ${unitWord(units.kind)} ${feature}`));
  const found = units.classes[units.class[unit]];
  if (found) head.append(el("bdi", { class: "state" }, plain(found.filter(Boolean).join(": "))));
  main.replaceChildren(
    el("nav", { class: "places", "aria-label": "Neighbours" }),
    head,
    ...said(notes),
    tiles([
      ["Density", percent(units.density[unit]), "of tokens"],
      ["Active", whole(units.count[unit]), "tokens"],
      ["Maximum", short(max), "activation"],
      ["Mean", short(detail.mean), "where active"],
      [units.kind === "adapter" ? "Decoder norm" : "Output norm", short(detail.norm), "of its row"],
    ]),
    el("div", { class: "parts" },
      el("div", { class: "lens" }, ...lens(units.promotedOf(unit), detail, tokens)),
      el("div", { class: "examples" }, ...exampleColumns(detail.examples, max, all)),
      el("div", { class: "charts" }, ...histograms(detail, site), ...overlap(notes))),
  );
  main.classList.toggle("short", all.short);
}

function tiles(list) {
  const tile = ([name, value, unit]) =>
    el("div", { class: "tile" }, el("span", {}, name), el("b", {}, value), el("i", {}, unit));
  return el("div", { class: "tiles" }, ...list.map(tile));
}

const VARIANTS = { top: "strongest examples", uniform: "examples drawn uniformly" };

/** What judges said: descriptions with their scores, reasons of classes. */
function said(notes) {
  const out = [];
  for (const { description, variant, judge } of notes.descriptions ?? []) {
    const facts = [`from the ${VARIANTS[variant] ?? variant}`, `judge: ${judge}`];
    for (const score of notes.scores ?? []) {
      if (score.variant !== variant || score.judge !== judge) continue;
      const right = score.true_positives + score.true_negatives;
      const asked = score.positives + score.negatives;
      facts.push(`detection ${percent(score.accuracy ?? NaN)} (${right} of ${asked})`);
    }
    const line = el("figcaption", {}, ...joined(facts));
    out.push(el("figure", { class: "said" }, el("blockquote", { dir: "auto" }, plain(description)), line));
  }
  for (const { class: name, subclass, reason, judge } of notes.classes ?? []) {
    const line = joined([[name, subclass].filter(Boolean).join(": "), reason, `judge: ${judge}`]);
    out.push(el("p", { class: "note" }, "Class ", ...line));
  }
  return out;
}

/** Facts on a line, each kept from reordering the others. */
function joined(facts) {
  return facts.flatMap((fact, i) => [...(i ? [" · "] : []), el("bdi", {}, plain(fact))]);
}

function lens(promoted, detail, tokens) {
  const most = Math.max(...[...detail.promoted_logits, ...detail.suppressed_logits].map(Math.abs), 1e-300);
  const part = (title, ids, logits, style) => {
    const rows = ids.map((token, i) => ({
      label: chip(tokens.text(token)),
      size: Math.abs(logits[i]) / most,
      text: short(logits[i]),
      tip: `${alone(tokens.text(token))} · ${logits[i]?.toPrecision(4)} · token ${token}`,
    })).filter((_, i) => ids[i] !== 0xffffffff);
    const content = rows.length ? bars(rows, style) : el("p", { class: "none" }, "No logit lens.");
    return chartCard(title, "logit", content);
  };
  return [
    part("Promoted tokens", promoted, detail.promoted_logits, "up"),
    part("Suppressed tokens", detail.suppressed, detail.suppressed_logits, "down"),
  ];
}

function histograms(detail, site) {
  const parts = (names, counts, totals) =>
    names.map((name, i) => ({ name, count: counts[i] ?? 0, total: totals[i] }));
  const present = (list) => list.filter(({ total }) => total > 0);
  const tenths = site.totals.tenth.map((_, i) => `${10 * i} to ${10 * (i + 1)}% of the thinking`);
  const regions = present(parts(site.regions, detail.by_region, site.totals.region));
  const domains = present(parts(site.domains.map(plain), detail.by_domain, site.totals.domain));
  const out = [
    chartCard("Activations by size", "tokens", sizes(detail.histogram, site.edges)),
    chartCard("By region", "share of its tokens", rateBars(regions)),
  ];
  if (site.totals.tenth.some((total) => total > 0)) {
    const along = parts(tenths, detail.by_tenth, site.totals.tenth);
    const chart = rateColumns(along, ["start", "end"], "Share of tokens by tenth of the thinking");
    out.push(chartCard("Along the thinking", "share of each tenth", chart));
  }
  if (domains.length) out.push(chartCard("By domain", "share of its tokens", rateBars(domains)));
  return out;
}

function overlap(notes) {
  return (notes.overlap ?? []).map(({ target, base }) =>
    chartCard("Same tokens when reading", "agreement", bars(
      [["the target", target], ["the base", base]].map(([label, share]) =>
        ({ label, size: share ?? 0, text: percent(share ?? NaN) })))));
}

function exampleColumns(examples, max, all) {
  const toggle = el("button", { class: "quiet", type: "button", id: "window", "aria-keyshortcuts": "w" });
  const column = (sample, title, note) => {
    const own = examples.filter((example) => example.sample === sample);
    const list = own.map((example) => el("li", {}, drawExample(example, max, all)));
    const none = own.length ? null : el("p", { class: "none" }, "None kept.");
    return el("section", { "aria-label": title },
      el("header", {}, el("h3", {}, title), el("span", { class: "note" }, note(own.length))),
      el("ol", {}, ...list), none);
  };
  return [
    el("header", {}, el("h2", {}, "Examples"), toggle),
    el("div", { class: "pair" },
      column(0, "Strongest", (n) => `${n} of them, by activation`),
      column(1, "Drawn uniformly", (n) => `${n} of all its activations`)),
  ];
}

function drawExample(example, max, { site, tokens, texts }) {
  const { start, position, value, values } = example;
  const facts = [`text ${texts.get(example.text) ?? example.text}`, `token ${whole(position)}`];
  if (example.region !== 255) facts.push(site.regions[example.region]);
  if (example.domain !== 255) facts.push(site.domains[example.domain]);
  const window = el("p", { class: "window", dir: "auto" });
  const pieces = tokens.running([...example.tokens], values);
  example.tokens.forEach((token, i) => {
    const at = start + i;
    const text = running(pieces[i]);
    const far = at < position - BEFORE || at > position + AFTER;
    const share = max > 0 ? Math.max(-1, Math.min(1, values[i] / max)) : 0;
    const names = [far && "far", at === position && "peak", share < 0 && "negative"].filter(Boolean);
    const number = values[i] === 0 ? "0" : values[i].toPrecision(4);
    window.append(el("span", {
      class: names.join(" ") || null,
      style: share === 0 ? {} : { "--share": Math.abs(share) },
      "data-tip": `${alone(tokens.text(token))} · ${number} · token ${at}`,
    }, text));
  });
  if (start < position - BEFORE) window.prepend(el("i", { class: "cut" }, "…"));
  if (start + example.tokens.length - 1 > position + AFTER) window.append(el("i", { class: "cut" }, "…"));
  return el("article", {}, el("header", {}, el("b", {}, short(value)), ...joined(facts)), window);
}
