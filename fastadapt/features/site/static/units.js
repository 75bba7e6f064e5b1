// Columns of the units of a kind, read layer by layer, and the search in them. A unit's number is
// layer * features + feature.
"use strict";

class Units {
  constructor(facts) {
    Object.assign(this, facts); // kind, layers, features, span, classes, tables
    this.n = facts.layers * facts.features;
    this.count = new Float64Array(this.n);
    this.density = new Float32Array(this.n);
    this.max = new Float32Array(this.n);
    this.contribution = new Float32Array(this.n); // density × mean activation × norm of the row
    // Rise of the KL without the unit; -Infinity if not measured, which sorts last.
    this.effect = new Float32Array(this.n).fill(-Infinity);
    this.base_share = new Float32Array(this.n).fill(NaN); // share in the base, -1 to 1
    this.origin = new Uint8Array(this.n).fill(255);
    this.region = new Uint8Array(this.n).fill(255);
    this.class = new Uint8Array(this.n).fill(255);
    this.width = 0; // promoted tokens per unit
    this.promoted = null;
    this.description = new Array(this.n);
    this.lowered = new Array(this.n);
    this.ready = new Uint8Array(facts.layers);
    this.version = 0; // number of layers read
    this.reading = new Map();
    this.orders = new Map();
  }

  /** Reads a layer on the first call. Returns a promise. */
  layer(layer) {
    let reading = this.reading.get(layer);
    if (!reading) {
      reading = fastadapt.load(`${this.kind}-${layer}`).then((shard) => this.insert(layer, shard));
      this.reading.set(layer, reading);
    }
    return reading;
  }

  insert(layer, { facts, columns }) {
    const first = layer * this.features;
    for (const name of ["count", "density", "max", "contribution", "effect", "region", "class"]) {
      this[name].set(columns[name], first);
    }
    for (const name of ["base_share", "origin"]) {
      if (columns[name]) this[name].set(columns[name], first);
    }
    if (columns.promoted) {
      const width = columns.promoted.length / this.features;
      if (!this.promoted) {
        this.width = width;
        this.promoted = new Uint32Array(this.n * width).fill(0xffffffff);
      }
      for (let i = 0; i < this.features; i++) {
        for (let k = 0; k < Math.min(width, this.width); k++) {
          this.promoted[(first + i) * this.width + k] = columns.promoted[i * width + k];
        }
      }
    }
    columns.described.forEach((feature, i) => {
      this.description[first + feature] = facts.descriptions[i];
      this.lowered[first + feature] = facts.descriptions[i].toLowerCase();
    });
    this.ready[layer] = 1;
    this.version++;
  }

  get whole() {
    return this.version === this.layers;
  }

  promotedOf(unit) {
    if (!this.promoted) return [];
    const row = this.promoted.subarray(unit * this.width, (unit + 1) * this.width);
    return Array.from(row).filter((token) => token !== 0xffffffff);
  }

  /** Returns the units read so far, the largest `key` first, equal ones by number. */
  order(key) {
    const known = this.orders.get(key);
    if (known && known.version === this.version) return known.order;
    const length = this.version * this.features;
    const order = new Uint32Array(length);
    let end = 0;
    for (let layer = 0; layer < this.layers; layer++) {
      if (!this.ready[layer]) continue;
      for (let i = 0; i < this.features; i++) order[end++] = layer * this.features + i;
    }
    if (key !== "index") {
      // Sorts numbers that combine value and unit. The bits of a non-negative float are ordered
      // like the float, and those of a negative one in reverse. Above 2 ** 21 units the value loses
      // its lowest bits, so that the number stays below 2 ** 53.
      const span = 2 ** Math.ceil(Math.log2(this.n + 1));
      const drop = Math.max(1, span / 2 ** 21);
      const bits = new Uint32Array(this[key].buffer);
      const keys = new Float64Array(length);
      for (let i = 0; i < length; i++) {
        const bit = bits[order[i]];
        const rank = (bit >> 31 ? ~bit : bit | 0x80000000) >>> 0;
        keys[i] = Math.floor(rank / drop) * span + (span - 1 - order[i]);
      }
      keys.sort();
      for (let i = 0; i < length; i++) order[length - 1 - i] = span - 1 - (keys[i] % span);
    }
    this.orders.set(key, { version: this.version, order });
    return order;
  }

  /**
   * Returns the units that match, in order.
   * wanted: q, token (text); layer, region, origin (numbers, or null); classes (a Set of codes, or
   * null); from, to (densities, or null); dead; key (contribution, effect, density, max, base_share,
   * index); rising. By base_share, units that have none are left out.
   */
  match(wanted, tokens) {
    const order = this.order(wanted.key);
    const out = new Uint32Array(order.length);
    const { count, density, region, promoted, width, lowered } = this;
    const words = wanted.q.split(/\s+/).filter(Boolean);
    const partial = wanted.q ? tokens.including(wanted.q) : null;
    const exact = wanted.token ? tokens.equal(wanted.token) : null;
    const promotes = (unit, flags) => {
      for (let i = unit * width, end = i + width; i < end; i++) {
        if (flags[promoted[i]] === 1) return true;
      }
      return false;
    };
    const isDescribed = (unit) => {
      const text = lowered[unit];
      return text !== undefined && words.every((word) => text.includes(word));
    };
    const low = wanted.layer === null ? 0 : wanted.layer * this.features;
    const high = wanted.layer === null ? this.n : low + this.features;
    // Rounded like the stored densities, so that bounds are inclusive.
    const from = wanted.from === null ? -1 : Math.fround(wanted.from);
    const to = wanted.to === null ? Infinity : Math.fround(wanted.to);
    let n = 0;
    for (let i = 0; i < order.length; i++) {
      const unit = wanted.rising ? order[order.length - 1 - i] : order[i];
      if (unit < low || unit >= high) continue;
      if (!wanted.dead && count[unit] === 0) continue;
      if (wanted.region !== null && region[unit] !== wanted.region) continue;
      if (wanted.origin !== null && this.origin[unit] !== wanted.origin) continue;
      if (wanted.key === "base_share" && Number.isNaN(this.base_share[unit])) continue;
      if (wanted.classes !== null && !wanted.classes.has(this.class[unit])) continue;
      if (density[unit] < from || density[unit] > to) continue;
      if (exact && !promotes(unit, exact)) continue;
      if (partial && !promotes(unit, partial) && !isDescribed(unit)) continue;
      out[n++] = unit;
    }
    return out.subarray(0, n);
  }
}

const BYTES = /⟨((?:[0-9A-F]{2} )*[0-9A-F]{2})⟩/u;
const MAX_SHARING = 16; // largest number of tokens that share characters

/**
 * Returns the text of tokens from index `first` that share characters, and their number: see
 * fastadapt.features.store.characters.
 */
function sharedText(texts, first) {
  const raw = [];
  for (let length = 1; length <= MAX_SHARING && BYTES.test(texts[first + length - 1] ?? ""); length++) {
    texts[first + length - 1].split(BYTES).forEach((part, i) =>
      raw.push(...(i % 2 ? part.split(" ").map((pair) => parseInt(pair, 16)) : new TextEncoder().encode(part))));
    try {
      const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
      return { text: decoder.decode(new Uint8Array(raw)), length };
    } catch {
      // The bytes end within a character: add the next token.
    }
  }
  return { text: texts[first], length: 1 };
}

/** Texts of the vocabulary. */
class Tokens {
  constructor({ facts, columns }) {
    this.strings = [];
    columns.token.forEach((token, i) => (this.strings[token] = facts.strings[i]));
    this.cached = new Map();
  }

  text(token) {
    return this.strings[token] ?? `⟨token ${token}⟩`;
  }

  /**
   * Returns the texts of consecutive tokens. A text that several tokens share is returned for the
   * one with the largest |value|, and empty texts for the others.
   */
  sequence(ids, values) {
    const texts = ids.map((id) => this.text(id));
    const out = [...texts];
    for (let first = 0; first < texts.length; ) {
      const { text, length } = sharedText(texts, first);
      if (length > 1) {
        let strongest = first;
        for (let i = first; i < first + length; i++) {
          out[i] = "";
          if (Math.abs(values[i]) > Math.abs(values[strongest])) strongest = i;
        }
        out[strongest] = text;
      }
      first += length;
    }
    return out;
  }

  get lowered() {
    this.all ??= this.strings.map((string) => string.toLowerCase());
    return this.all;
  }

  /** Returns a flag per token: whether its text includes `text`. */
  including(text) {
    return this.flags(`in ${text}`, (string) => string.includes(text));
  }

  /** Returns a flag per token: whether its text, without surrounding spaces, is `text`. */
  equal(text) {
    return this.flags(`is ${text}`, (string) => string.trim() === text);
  }

  flags(name, test) {
    if (!this.cached.has(name)) {
      const flags = new Uint8Array(this.strings.length);
      this.lowered.forEach((string, token) => (flags[token] = test(string) ? 1 : 0));
      if (this.cached.size > 8) this.cached.clear();
      this.cached.set(name, flags);
    }
    return this.cached.get(name);
  }
}
