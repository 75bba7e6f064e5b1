// Draws small charts from HTML boxes.
"use strict";

function chartCard(title, note, content) {
  const header = el("header", {}, el("h3", {}, title), el("span", {}, note));
  return el("section", { class: "card", "aria-label": title }, header, content);
}

/** Draws horizontal bars. rows: {label (node or text), size (0 to 1), text, tip}. */
function bars(rows, style = "") {
  const list = el("ul", { class: `bars ${style}` });
  for (const row of rows) {
    const bar = el("i", { style: { "--size": Math.max(0, Math.min(1, row.size || 0)) } });
    const label = el("span", { class: "label" }, row.label);
    list.append(el("li", { "data-tip": row.tip }, label, bar, el("b", {}, row.text)));
  }
  return list;
}

/** Draws vertical bars. list: {size (0 to 1), tip}; ends: labels of the first and the last bar. */
function columns(list, ends, label) {
  const boxes = list.map(({ size, tip }) =>
    el("i", { style: { "--size": size || 0 }, "data-tip": tip }));
  const chart = el("div", { class: "columns", role: "img", "aria-label": label }, ...boxes);
  const axis = el("div", { class: "ends", "aria-hidden": "true" }, ...ends.map((end) => el("span", {}, end)));
  return el("div", {}, chart, axis);
}

/** Draws the histogram of activations between edges, without empty bins at both ends. */
function histogram(counts, edges) {
  const first = counts.findIndex((count) => count > 0);
  if (first < 0) return el("p", { class: "none" }, "No activation on these texts.");
  let last = counts.length - 1;
  while (counts[last] === 0) last--;
  const largest = Math.max(...counts);
  const name = (i) =>
    i === 0 ? `up to ${formatNumber(edges[0])}`
    : i === edges.length ? `above ${formatNumber(edges[i - 1])}`
    : `${formatNumber(edges[i - 1])} to ${formatNumber(edges[i])}`;
  const list = [];
  for (let i = first; i <= last; i++) {
    list.push({ size: counts[i] / largest, tip: `${name(i)}: ${formatInteger(counts[i])}` });
  }
  const peak = name(counts.indexOf(largest));
  const ends = [first === 0 ? "0" : formatNumber(edges[first - 1])];
  ends.push(last === edges.length ? `above ${formatNumber(edges[last - 1])}` : formatNumber(edges[last]));
  return columns(list, ends, `Activations by size; most are ${peak}.`);
}

/** Returns the share of active tokens of each part, and sizes of bars. parts: {name, count, total}. */
function rates(parts) {
  const shares = parts.map(({ count, total }) => (total > 0 ? count / total : 0));
  const largest = Math.max(...shares, 1e-300);
  return parts.map(({ name, count, total }, i) => ({
    label: name,
    size: shares[i] / largest,
    text: formatPercent(shares[i]),
    tip: `${name}: ${formatInteger(count)} of ${formatInteger(total)} tokens`,
  }));
}

function rateBars(parts) {
  return bars(rates(parts));
}

function rateColumns(parts, ends, label) {
  const list = rates(parts).map(({ size, text, tip }) => ({ size, tip: `${tip}, ${text}` }));
  return columns(list, ends, label);
}
