// Small charts, of boxes.
"use strict";

function chartCard(title, note, content) {
  const header = el("header", {}, el("h3", {}, title), el("span", {}, note));
  return el("section", { class: "card", "aria-label": title }, header, content);
}

/** Lying bars. rows: {label (a node or text), size (of 1), text, tip}. */
function bars(rows, style = "") {
  const list = el("ul", { class: `bars ${style}` });
  for (const row of rows) {
    const bar = el("i", { style: { "--size": Math.max(0, Math.min(1, row.size || 0)) } });
    const label = el("span", { class: "label" }, row.label);
    list.append(el("li", { "data-tip": row.tip }, label, bar, el("b", {}, row.text)));
  }
  return list;
}

/** Standing bars. columns: {size (of 1), tip}; ends: what is written under the first and last. */
function columns(list, ends, label) {
  const boxes = list.map(({ size, tip }) =>
    el("i", { style: { "--size": size || 0 }, "data-tip": tip }));
  const chart = el("div", { class: "columns", role: "img", "aria-label": label }, ...boxes);
  const axis = el("div", { class: "ends", "aria-hidden": "true" }, ...ends.map((end) => el("span", {}, end)));
  return el("div", {}, chart, axis);
}

/** Activations by size: bins between edges, those at both ends that are empty left out. */
function sizes(counts, edges) {
  const first = counts.findIndex((count) => count > 0);
  if (first < 0) return el("p", { class: "none" }, "It never fired.");
  let last = counts.length - 1;
  while (counts[last] === 0) last--;
  const most = Math.max(...counts);
  const name = (i) =>
    i === 0 ? `up to ${short(edges[0])}`
    : i === edges.length ? `above ${short(edges[i - 1])}`
    : `${short(edges[i - 1])} to ${short(edges[i])}`;
  const list = [];
  for (let i = first; i <= last; i++) {
    list.push({ size: counts[i] / most, tip: `${name(i)}: ${whole(counts[i])}` });
  }
  const peak = name(counts.indexOf(most));
  const ends = [first === 0 ? "0" : short(edges[first - 1])];
  ends.push(last === edges.length ? `above ${short(edges[last - 1])}` : short(edges[last]));
  return columns(list, ends, `Activations by size; most are ${peak}.`);
}

/** Shares of each part's tokens at which the unit is active: {name, count, total}. */
function rates(parts) {
  return parts.map(({ name, count, total }) => ({
    name,
    rate: total > 0 ? count / total : 0,
    tip: `${name}: ${whole(count)} of ${whole(total)} tokens`,
  }));
}

function rateBars(parts) {
  const found = rates(parts);
  const most = Math.max(...found.map(({ rate }) => rate), 1e-300);
  return bars(found.map(({ name, rate, tip }) =>
    ({ label: name, size: rate / most, text: percent(rate), tip })));
}

function rateColumns(parts, ends, label) {
  const found = rates(parts);
  const most = Math.max(...found.map(({ rate }) => rate), 1e-300);
  return columns(found.map(({ rate, tip }) =>
    ({ size: rate / most, tip: `${tip}, ${percent(rate)}` })), ends, label);
}
