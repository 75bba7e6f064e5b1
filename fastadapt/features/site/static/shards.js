// Loads data from scripts, the only files that a page opened as a file may read. shards.py has the
// format.
"use strict";

const fastadapt = (() => {
  const TYPES = { u8: Uint8Array, u32: Uint32Array, f32: Float32Array, f64: Float64Array };
  const NAME = /^[a-z]+(-\d+){0,2}$/;
  const CACHE_SIZE = 24; // shards of pages in memory
  const waiting = new Map();
  const cache = new Map(); // least recently used first
  let stamp = null;

  // The Content-Security-Policy of index.html only allows script URLs of this policy.
  const policy = window.trustedTypes?.createPolicy("fastadapt", { createScriptURL: (url) => url });

  function shard(name, mark, data) {
    waiting.get(name)?.({ mark, data });
  }

  function fetchShard(name) {
    if (!NAME.test(name)) throw new TypeError("expected the name of a shard");
    const path = `data/${name}.js`;
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      const end = (error) => {
        waiting.delete(name);
        script.remove();
        reject(error); // no effect if shard() has resolved the promise
      };
      waiting.set(name, resolve);
      script.onload = () => end(new Error(`${path} has no data`));
      script.onerror = () => end(new Error(`${path} cannot be read`));
      script.src = policy ? policy.createScriptURL(path) : path;
      document.head.append(script);
    });
  }

  function fromBase64(text) {
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
    const letters = atob(text);
    const out = new Uint8Array(letters.length);
    for (let i = 0; i < out.length; i++) out[i] = letters.charCodeAt(i);
    return out;
  }

  async function unpack(data) {
    if (!window.DecompressionStream) throw new Error("These pages need a browser of 2023 or later.");
    const packed = new Blob([fromBase64(data)]).stream();
    const stream = packed.pipeThrough(new DecompressionStream("deflate"));
    const raw = new Uint8Array(await new Response(stream).arrayBuffer());
    const length = new DataView(raw.buffer).getUint32(0, true);
    const head = JSON.parse(new TextDecoder().decode(raw.subarray(4, 4 + length)));
    const columns = {};
    let offset = 4 + length;
    for (const [name, type, entries] of head.columns) {
      const Type = TYPES[type];
      const size = Type.BYTES_PER_ELEMENT;
      const out = new Uint8Array(entries * size);
      for (let byte = 0; byte < size; byte++) {
        for (let i = 0, to = byte; i < entries; i++, to += size) out[to] = raw[offset++];
      }
      columns[name] = new Type(out.buffer);
    }
    return { facts: head.facts, columns };
  }

  async function get(name) {
    const { mark, data } = await fetchShard(name);
    stamp ??= mark;
    if (mark !== stamp) throw new Error("These pages were exported again. Reload them.");
    return unpack(data);
  }

  /** Returns a promise of the contents of a shard, `{facts, columns}`. keep: cache them. */
  function load(name, keep = false) {
    if (!keep) return get(name);
    let contents = cache.get(name);
    if (contents) cache.delete(name); // is inserted again at the end
    else {
      contents = get(name);
      contents.catch(() => cache.delete(name));
    }
    cache.set(name, contents);
    if (cache.size > CACHE_SIZE) cache.delete(cache.keys().next().value);
    return contents;
  }

  return { load, shard };
})();
