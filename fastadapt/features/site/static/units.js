// The units of a kind as columns, an entry per unit: layer by layer as they are read, and which of
// them match. A unit's number is layer * features + feature.
"use strict";

class Units {
  constructor(facts) {
    Object.assign(this, facts); // kind, layers, features, span, classes, tables
    this.n = facts.layers * facts.features;
    this.count = new Float64Array(this.n);
    this.density = new Float32Array(this.n);
    this.max = new Float32Array(this.n);
    this.region = new Uint8Array(this.n).fill(255);
    this.class = new Uint8Array(this.n).fill(255);
    this.width = 0; // promoted tokens of each
    this.promoted = null;
    this.description = new Array(this.n);
    this.lowered = new Array(this.n);
    this.ready = new Uint8Array(facts.layers);
    this.version = 0; // layers read
    this.reading = new Map();
    this.orders = new Map();
  }

  /** Reads a layer, once. */
  layer(layer) {
    let found = this.reading.get(layer);
    if (!found) {
      found = fastadapt.load(`${this.kind}-${layer}`).then((read) => this.take(layer, read));
      this.reading.set(layer, found);
    }
    return found;
  }

  take(layer, { facts, columns }) {
    const first = layer * this.features;
    for (const name of ["count", "density", "max", "region", "class"]) {
      this[name].set(columns[name], first);
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

  /** Units read so far, the largest `key` first, equal ones by number. */
  order(key) {
    const known = this.orders.get(key);
    if (known && known.version === this.version) return known.order;
    const length = this.version * this.features;
    const order = new Uint32Array(length);
    let at = 0;
    for (let layer = 0; layer < this.layers; layer++) {
      if (!this.ready[layer]) continue;
      for (let i = 0; i < this.features; i++) order[at++] = layer * this.features + i;
    }
    if (key !== "index") {
      // One number per unit that sorts as (value, number): the bits of a float that is not
      // negative rise with it. Above 2 ** 21 units the value loses its lowest bits, to stay exact.
      const span = 2 ** Math.ceil(Math.log2(this.n + 1));
      const drop = Math.max(1, span / 2 ** 21);
      const bits = new Uint32Array(this[key].buffer);
      const keys = new Float64Array(length);
      for (let i = 0; i < length; i++) {
        keys[i] = Math.floor(bits[order[i]] / drop) * span + (span - 1 - order[i]);
      }
      keys.sort();
      for (let i = 0; i < length; i++) order[length - 1 - i] = span - 1 - (keys[i] % span);
    }
    this.orders.set(key, { version: this.version, order });
    return order;
  }

  /**
   * Units that match, in order.
   * wanted: q, token (text); layer, region (numbers, or null); classes (a Set of codes, or null);
   * from, to (densities, or null); dead; key (density, max, index); rising.
   */
  match(wanted, tokens) {
    const order = this.order(wanted.key);
    const out = new Uint32Array(order.length);
    const { count, density, region, promoted, width, lowered } = this;
    const words = wanted.q.split(/\s+/).filter(Boolean);
    const some = wanted.q ? tokens.holding(wanted.q) : null;
    const exact = wanted.token ? tokens.named(wanted.token) : null;
    const promotes = (unit, flags) => {
      for (let i = unit * width, end = i + width; i < end; i++) {
        if (flags[promoted[i]] === 1) return true;
      }
      return false;
    };
    const says = (unit) => {
      const text = lowered[unit];
      return text !== undefined && words.every((word) => text.includes(word));
    };
    const low = wanted.layer === null ? 0 : wanted.layer * this.features;
    const high = wanted.layer === null ? this.n : low + this.features;
    // Bounds as the densities are kept, so that an equal one is within.
    const from = wanted.from === null ? -1 : Math.fround(wanted.from);
    const to = wanted.to === null ? Infinity : Math.fround(wanted.to);
    let found = 0;
    for (let i = 0; i < order.length; i++) {
      const unit = wanted.rising ? order[order.length - 1 - i] : order[i];
      if (unit < low || unit >= high) continue;
      if (!wanted.dead && count[unit] === 0) continue;
      if (wanted.region !== null && region[unit] !== wanted.region) continue;
      if (wanted.classes !== null && !wanted.classes.has(this.class[unit])) continue;
      if (density[unit] < from || density[unit] > to) continue;
      if (exact && !promotes(unit, exact)) continue;
      if (some && !promotes(unit, some) && !says(unit)) continue;
      out[found++] = unit;
    }
    return out.subarray(0, found);
  }
}

const BYTES = /⟨((?:[0-9A-F]{2} )*[0-9A-F]{2})⟩/u;
const SHARING = 16; // tokens that share characters, at most

/** The text that tokens from a place on share, and how many: see fastadapt.features.store.characters. */
function shared(texts, place) {
  const raw = [];
  for (let length = 1; length <= SHARING && BYTES.test(texts[place + length - 1] ?? ""); length++) {
    texts[place + length - 1].split(BYTES).forEach((part, i) =>
      raw.push(...(i % 2 ? part.split(" ").map((pair) => parseInt(pair, 16)) : new TextEncoder().encode(part))));
    try {
      const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
      return { text: decoder.decode(new Uint8Array(raw)), length };
    } catch {
      // Not whole yet.
    }
  }
  return { text: texts[place], length: 1 };
}

/** The vocabulary. */
class Tokens {
  constructor({ facts, columns }) {
    this.strings = [];
    columns.token.forEach((token, i) => (this.strings[token] = facts.strings[i]));
    this.cached = new Map();
  }

  text(token) {
    return this.strings[token] ?? `⟨token ${token}⟩`;
  }

  /** The text of each token of a stretch; one that several share is at the strongest of them. */
  running(ids, values) {
    const texts = ids.map((id) => this.text(id));
    const out = [...texts];
    for (let place = 0; place < texts.length; ) {
      const { text, length } = shared(texts, place);
      if (length > 1) {
        let strongest = place;
        for (let i = place; i < place + length; i++) {
          out[i] = "";
          if (Math.abs(values[i]) > Math.abs(values[strongest])) strongest = i;
        }
        out[strongest] = text;
      }
      place += length;
    }
    return out;
  }

  get lowered() {
    this.all ??= this.strings.map((string) => string.toLowerCase());
    return this.all;
  }

  /** A flag per token: whether its text has this in it. */
  holding(text) {
    return this.flags(`in ${text}`, (string) => string.includes(text));
  }

  /** A flag per token: whether this is its text, whatever the spaces around it. */
  named(text) {
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
