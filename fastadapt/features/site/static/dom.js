// Creates elements, and formats numbers and texts of tokens. Texts from the data become text nodes
// or attributes, never markup.
"use strict";

const DRAWN = new Set(["svg", "g", "path", "circle", "rect", "line", "text"]); // elements of SVG

/** Creates an element. properties: attributes, `on` for listeners, `style` for CSS properties. */
function el(tag, properties = {}, ...children) {
  const space = DRAWN.has(tag) ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml";
  const out = document.createElementNS(space, tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") Object.entries(value).forEach(([event, f]) => out.addEventListener(event, f));
    else if (name === "style") Object.entries(value).forEach(([key, v]) => out.style.setProperty(key, v));
    else if (name === "href" && !String(value).startsWith("#/")) throw new TypeError("expected a link within the site");
    else out.setAttribute(name, value === true ? "" : String(value));
  }
  out.append(...children.filter((child) => child !== null && child !== undefined));
  return out;
}

// Characters that are invisible or change the order of the text around them.
const INVISIBLE =
  /[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\uffff]|[\u{1d173}-\u{1d17a}\u{e0000}-\u{e0fff}]/gu;

function codePoint(character) {
  return `⟨U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
}

/** Returns a text on one line, with visible symbols for invisible characters. */
function inlineText(text) {
  return text.replace(INVISIBLE, codePoint).replace(/\r/g, "␍").replace(/\n/g, "↵").replace(/\t/g, "⇥");
}

/** Returns a text with visible symbols for invisible characters. Line breaks are also kept. */
function blockText(text) {
  const marked = text.replace(INVISIBLE, codePoint).replace(/\r/g, "␍").replace(/\t/g, "⇥");
  return marked.replace(/\n+/g, (breaks) => `${"↵".repeat(breaks.length)}\n`);
}

/** Returns the text of a token, with visible symbols for spaces at its ends. */
function tokenText(text) {
  return inlineText(text).replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length));
}

function tokenChip(text) {
  const [, before, middle, after] = /^(␣*)(.*?)(␣*)$/su.exec(tokenText(text));
  const spaces = (marks) => (marks ? el("i", {}, marks) : null);
  return el("bdi", { class: "token" }, spaces(before), middle, spaces(after));
}

function formatInteger(number) {
  return number.toLocaleString("en-US");
}

/** Formats a number with three significant digits. */
function formatNumber(number) {
  if (number === null || Number.isNaN(number)) return "–";
  if (number === 0) return "0";
  const size = Math.abs(number);
  const text = size >= 1e6 || size < 1e-3
    ? number.toExponential(1).replace("e+", "e")
    : number.toLocaleString("en-US", { maximumSignificantDigits: 3 });
  return text.replaceAll("-", "−");
}

/** Formats a share of 1 as a percentage with two significant digits. */
function formatPercent(share) {
  if (!Number.isFinite(share)) return "–";
  if (share === 0) return "0%";
  const value = 100 * share;
  const size = Math.abs(value);
  const digits = { minimumSignificantDigits: size < 10 ? 2 : 1, maximumSignificantDigits: 2 };
  const text = size < 1e-4 ? value.toExponential(1) : value.toLocaleString("en-US", digits);
  return `${share < 0 ? text.replace("-", "−") : text}%`;
}

/** Parses a share, a number or a percentage; null for an empty text, NaN for an invalid one. */
function parseShare(text) {
  const trimmed = text.trim();
  if (!trimmed) return null;
  const value = Number(trimmed.replace(/%$/, ""));
  return trimmed.endsWith("%") ? value / 100 : value;
}

const KIND_NAMES = { adapter: "Adapter", base: "Base MLP", target: "Target MLP" };

function unitNoun(kind, count = 1) {
  return (kind === "adapter" ? "feature" : "neuron") + (count === 1 ? "" : "s");
}
