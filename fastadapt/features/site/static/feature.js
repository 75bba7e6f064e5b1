// Draws the page of one unit.
"use strict";

// Tokens of a short window before and after the example's token.
const BEFORE = 20;
const AFTER = 10;
const EXAMPLE_COLUMNS = ["sample", "text", "position", "start", "value", "region", "domain"];

/** Returns a unit's part of a shard. */
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
  const { window, fires } = columns.offsets;
  const [first, end] = columns.offsets.example.subarray(row, row + 2);
  const examples = [];
  for (let i = first; i < end; i++) {
    const tokens = columns.window_token.subarray(window[i], window[i + 1]);
    const values = new Float32Array(tokens.length);
    for (let f = fires[i]; f < fires[i + 1]; f++) values[columns.fires_at[f]] = columns.fires_value[f];
    const example = { tokens, values };
    for (const name of EXAMPLE_COLUMNS) example[name] = columns[`example_${name}`][i];
    examples.push(example);
  }
  const names = ["histogram", "by_domain", "by_region", "by_tenth", "promoted_logits",
    "suppressed", "suppressed_logits"];
  const out = { examples };
  for (const name of ["mean", "norm", "base_scale", "target_scale", "difference_scale"]) {
    out[name] = columns[name]?.[row];
  }
  names.forEach((name) => (out[name] = rowOf(name)));
  return out;
}

/** Draws the page into `main`. context: {units, unit, site, tokens, texts, shard, short}. */
function drawFeature(main, context) {
  const { units, unit, site, tokens, shard } = context;
  const layer = Math.floor(unit / units.features);
  const feature = unit % units.features;
  const detail = detailOf(shard, feature % units.span);
  const notes = shard.facts.notes[feature] ?? {};
  const max = units.max[unit];
  const origin = site.origins[units.origin[unit]];
  const head = el("header", { class: "unit" },
    el("h2", {}, `Layer ${layer}, ${unitNoun(units.kind)} ${feature}`));
  const names = units.classes[units.class[unit]];
  if (names) head.append(el("bdi", { class: "state" }, inlineText(names.filter(Boolean).join(": "))));
  main.replaceChildren(
    el("nav", { class: "places", "aria-label": "Neighbours" }),
    head,
    ...judgements(notes),
    tiles([
      ["Density", formatPercent(units.density[unit]), "of tokens"],
      ["Active", formatInteger(units.count[unit]), "tokens"],
      ["Maximum", formatNumber(max), "activation"],
      ["Mean", formatNumber(detail.mean), "where active"],
      [units.kind === "adapter" ? "Decoder norm" : "Output norm", formatNumber(detail.norm), "of its row"],
      ["Contribution", formatNumber(units.contribution[unit]), "density × mean × norm"],
      ...(origin ? [["In the base", formatPercent(units.base_share[unit]), origin]] : []),
      ...(notes.effects ?? []).map(({ delta_kl: rise }) =>
        ["When ablated", `${rise < 0 ? "−" : "+"}${formatNumber(Math.abs(rise))}`, "KL, nats per token"]),
    ]),
    ...(origin ? [el("p", { class: "note" }, scalesText(detail, origin))] : []),
    el("div", { class: "parts" },
      el("div", { class: "lens" }, ...lens(units.promotedOf(unit), detail, tokens)),
      el("div", { class: "examples" }, ...exampleColumns(detail.examples, max, context)),
      el("div", { class: "charts" }, ...histograms(detail, site), ...overlap(notes))),
  );
  main.classList.toggle("short", context.short);
}

function tiles(list) {
  const tile = ([name, value, unit]) =>
    el("div", { class: "tile" }, el("span", {}, name), el("b", {}, value), el("i", {}, unit));
  return el("div", { class: "tiles" }, ...list.map(tile));
}

const ORIGINS = {
  new: "the base's writes nearly nothing, so that fine-tuning taught it",
  strengthened: "fine-tuning strengthened what the base's writes",
  opposed: "fine-tuning removed what the base's writes against it",
  absent: "the target's writes no more than the base's",
};

/** Says what the MLPs write along a feature; see fastadapt.features.store.scales. */
function scalesText({ base_scale: base, target_scale: target, difference_scale: difference }, origin) {
  return "Where the feature fires, compared with other tokens, the base's MLP writes " +
    `${formatNumber(base)} times what the feature writes along its direction, and the target's MLP ` +
    `${formatNumber(target)} times: ${ORIGINS[origin]}. ` +
    `Less what the other features write, the MLPs differ by ${formatNumber(difference)} times the feature.`;
}

const VARIANTS = { top: "strongest examples", uniform: "examples drawn uniformly" };

/** Draws the results of judges: descriptions with their scores, classes with reasons. */
function judgements(notes) {
  const out = [];
  for (const { description, variant, judge } of notes.descriptions ?? []) {
    const facts = [`from the ${VARIANTS[variant] ?? variant}`, `judge: ${judge}`];
    for (const score of notes.scores ?? []) {
      if (score.variant !== variant || score.judge !== judge) continue;
      const right = score.true_positives + score.true_negatives;
      const total = score.positives + score.negatives;
      facts.push(`detection ${formatPercent(score.accuracy ?? NaN)} (${right} of ${total})`);
    }
    const line = el("figcaption", {}, ...joined(facts));
    out.push(el("figure", { class: "said" }, el("blockquote", { dir: "auto" }, inlineText(description)), line));
  }
  for (const { class: name, subclass, reason, judge } of notes.classes ?? []) {
    const line = joined([[name, subclass].filter(Boolean).join(": "), reason, `judge: ${judge}`]);
    out.push(el("p", { class: "note" }, "Class ", ...line));
  }
  return out;
}

/** Joins facts on a line. <bdi> isolates their writing directions. */
function joined(facts) {
  return facts.flatMap((fact, i) => [...(i ? [" · "] : []), el("bdi", {}, inlineText(fact))]);
}

function lens(promoted, detail, tokens) {
  const largest = Math.max(...[...detail.promoted_logits, ...detail.suppressed_logits].map(Math.abs), 1e-300);
  const card = (title, ids, logits, style) => {
    const rows = ids.map((token, i) => ({
      label: tokenChip(tokens.text(token)),
      size: Math.abs(logits[i]) / largest,
      text: formatNumber(logits[i]),
      tip: `${tokenText(tokens.text(token))} · ${logits[i]?.toPrecision(4)} · token ${token}`,
    })).filter((_, i) => ids[i] !== 0xffffffff);
    const content = rows.length ? bars(rows, style) : el("p", { class: "none" }, "No logit lens.");
    return chartCard(title, "logit", content);
  };
  return [
    card("Promoted tokens", promoted, detail.promoted_logits, "up"),
    card("Suppressed tokens", detail.suppressed, detail.suppressed_logits, "down"),
  ];
}

function histograms(detail, site) {
  const parts = (names, counts, totals) =>
    names.map((name, i) => ({ name, count: counts[i] ?? 0, total: totals[i] }));
  const present = (list) => list.filter(({ total }) => total > 0);
  const tenths = site.totals.tenth.map((_, i) => `${10 * i} to ${10 * (i + 1)}% of the thinking`);
  const regions = present(parts(site.regions, detail.by_region, site.totals.region));
  const domains = present(parts(site.domains.map(inlineText), detail.by_domain, site.totals.domain));
  const out = [
    chartCard("Activations by size", "tokens", histogram(detail.histogram, site.edges)),
    chartCard("By region", "share of the region's tokens", rateBars(regions)),
  ];
  if (site.totals.tenth.some((total) => total > 0)) {
    const along = parts(tenths, detail.by_tenth, site.totals.tenth);
    const chart = rateColumns(along, ["start", "end"], "Share of tokens by tenth of the thinking");
    out.push(chartCard("Along the thinking", "share of each tenth", chart));
  }
  if (domains.length) out.push(chartCard("By domain", "share of the domain's tokens", rateBars(domains)));
  return out;
}

function overlap(notes) {
  return (notes.overlap ?? []).map(({ target, base }) =>
    chartCard("Top tokens shared", "agreement", bars(
      [["with the target", target], ["with the base", base]].map(([label, share]) =>
        ({ label, size: share ?? 0, text: formatPercent(share ?? NaN) })))));
}

function exampleColumns(examples, max, context) {
  const toggle = el("button", { class: "quiet", type: "button", id: "window", "aria-keyshortcuts": "w" });
  const column = (sample, title, note) => {
    const selected = examples.filter((example) => example.sample === sample);
    const list = selected.map((example) => el("li", {}, drawExample(example, max, context)));
    const none = selected.length ? null : el("p", { class: "none" }, "No examples.");
    return el("section", { "aria-label": title },
      el("header", {}, el("h3", {}, title), el("span", { class: "note" }, note(selected.length))),
      el("ol", {}, ...list), none);
  };
  return [
    el("header", {}, el("h2", {}, "Examples"), toggle),
    el("div", { class: "pair" },
      column(0, "Strongest", (n) => `${n} with the largest activations`),
      column(1, "Drawn uniformly", (n) => `${n} from all activations`)),
  ];
}

function drawExample(example, max, { site, tokens, texts }) {
  const { start, position, value, values } = example;
  const facts = [`text ${texts.get(example.text) ?? example.text}`, `token ${formatInteger(position)}`];
  if (example.region !== 255) facts.push(site.regions[example.region]);
  if (example.domain !== 255) facts.push(site.domains[example.domain]);
  const window = el("p", { class: "window", dir: "auto" });
  const pieces = tokens.sequence([...example.tokens], values);
  example.tokens.forEach((token, i) => {
    const index = start + i;
    const far = index < position - BEFORE || index > position + AFTER;
    const share = max > 0 ? Math.max(-1, Math.min(1, values[i] / max)) : 0;
    const names = [far && "far", index === position && "peak", share < 0 && "negative"].filter(Boolean);
    const number = values[i] === 0 ? "0" : values[i].toPrecision(4);
    window.append(el("span", {
      class: names.join(" ") || null,
      style: share === 0 ? {} : { "--share": Math.abs(share) },
      "data-tip": `${tokenText(tokens.text(token))} · ${number} · token ${index}`,
    }, blockText(pieces[i])));
  });
  if (start < position - BEFORE) window.prepend(el("i", { class: "cut" }, "…"));
  if (start + example.tokens.length - 1 > position + AFTER) window.append(el("i", { class: "cut" }, "…"));
  return el("article", {}, el("header", {}, el("b", {}, formatNumber(value)), ...joined(facts)), window);
}
