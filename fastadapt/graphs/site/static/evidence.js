// Draws what the graph's file says of its truth: flow, account of the difference, ablations.
"use strict";

const ACCOUNT = [
  ["features", "features"], ["decoder_biases", "adapters' biases"], ["errors", "errors"],
  ["coefficients", "patterns, gates, norms"], ["remainder", "rounding"],
];

function drawEvidence(section, { file }) {
  const { flow, account, evidence, rows } = file;
  const [row] = rows;
  section.replaceChildren(
    el("h2", {}, "Evidence"),
    tiles([
      ["Replacement", formatPercent(flow.replacement), "influence that ends at tokens"],
      ["Completeness", formatPercent(flow.completeness), "of edges from features, tokens"],
      ["Biases", formatPercent(flow.biases), "of the influence"],
      ["Errors", formatPercent(flow.errors), "of the influence"],
      ["Pruned", formatPercent(flow.pruned), "of the influence"],
      ["Position 0", formatPercent(row.size ? row.first_position / row.size : 0), "of the target's edges"],
    ]),
    el("div", { class: "cards" }, drawAccount(file, account), ...(evidence ? drawAblations(evidence, file.stream) : [noAblations()])));
}

function drawAccount(file, account) {
  const change = account.with_adapters - account.hybrid;
  const largest = Math.max(...ACCOUNT.map(([name]) => Math.abs(account[name])), 1e-300);
  const list = el("ol", { class: "edges" });
  for (const [name, label] of ACCOUNT) {
    if (name === "errors" && account[name] === 0) continue;
    list.append(el("li", {}, el("span", { class: "edge-line" }, el("span", { class: "label" }, label),
      el("i", { class: account[name] < 0 ? "lowers" : "raises", style: { "--size": Math.abs(account[name]) / largest } }),
      el("b", {}, signedNumber(account[name])))));
  }
  const compared = file.stream === "ranks" ? "value in the target minus that without its low-rank parts"
    : `value in the ${file.stream} minus the hybrid`;
  return card("Account of the difference", compared,
    el("p", { class: "sum" }, `${formatNumber(account.with_adapters)} − (${formatNumber(account.hybrid)}) = `, el("b", {}, signedNumber(change))),
    list);
}

function noAblations() {
  return card("Ablations", "", el("p", { class: "none" }, "No ablations were measured (--evidence.ablations 0)."));
}

function drawAblations({ samples, curve, returned }, stream) {
  const [unit, later] = stream === "ranks" ? ["component", "components"] : ["feature", "adapters"];
  const interval = ([middle, low, high]) => `${formatNumber(round(middle))} [${formatNumber(round(low))}, ${formatNumber(round(high))}]`;
  const rows = samples.flatMap(({ name, nodes, correlations }) => correlations.map(({ predictor, spearman, pearson }, i) =>
    [i ? "" : `${nodes.length} ${name}`, predictor, interval(spearman), interval(pearson)]));
  const shares = curve.n.map((n, i) =>
    [formatInteger(n), ...["ablated", "ablated_random", "isolated", "isolated_random"].map((name) => tenths(curve[name][i]))]);
  return [
    card(`Effects of removing one ${unit}`, "measured against predicted",
      table([`${unit}s`, "predicted by", "Spearman", "Pearson"], rows),
      el("p", { class: "note" }, `Later ${later} undo ${signedPercent(returned)} of the effects.`)),
    card(`Removing and leaving the first n ${unit}s`, "share of the effect of all",
      table(["n", "removed", "random", "only these", "random"], shares)),
  ];
}

/** Formats a share as a percentage with one decimal. */
function tenths(share) {
  return `${(Math.round(1000 * share) / 10 + 0).toFixed(1).replace("-", "−")}%`;
}

function round(value) {
  return Math.round(100 * value) / 100;
}

function table(head, rows) {
  return el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, ...head.map((text) => el("th", {}, text)))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((text) => el("td", {}, text)))))));
}
