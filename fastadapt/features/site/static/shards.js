// Reads the data: scripts, since a page opened as a file may read nothing else. What a shard holds
// is said in shards.py.
"use strict";

const fastadapt = (() => {
  const TYPES = { u8: Uint8Array, u32: Uint32Array, f32: Float32Array, f64: Float64Array };
  const NAME = /^[a-z]+(-\d+){0,2}$/;
  const KEPT = 24; // pages' shards in memory: enough to go back and forth
  const waiting = new Map();
  const read = new Map();
  let stamp = null;

  // The page's policy forbids every other script, and markup made of strings altogether.
  const policy = window.trustedTypes?.createPolicy("fastadapt", { createScriptURL: (url) => url });

  function shard(name, mark, data) {
    waiting.get(name)?.({ mark, data });
  }

  function fetchShard(name) {
    if (!NAME.test(name)) throw new TypeError("no name of a shard");
    const path = `data/${name}.js`;
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      const end = (error) => {
        waiting.delete(name);
        script.remove();
        reject(error); // of no effect where the data came
      };
      waiting.set(name, resolve);
      script.onload = () => end(new Error(`${path} holds no data`));
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
    let at = 4 + length;
    for (const [name, type, entries] of head.columns) {
      const Type = TYPES[type];
      const size = Type.BYTES_PER_ELEMENT;
      const out = new Uint8Array(entries * size);
      for (let byte = 0; byte < size; byte++) {
        for (let i = 0, to = byte; i < entries; i++, to += size) out[to] = raw[at++];
      }
      columns[name] = new Type(out.buffer);
    }
    return { facts: head.facts, columns };
  }

  async function get(name) {
    const { mark, data } = await fetchShard(name);
    stamp ??= mark;
    if (mark !== stamp) throw new Error("These pages were exported anew: reload them.");
    return unpack(data);
  }

  /** The contents of a shard, `{facts, columns}`; `keep`: it may be asked for again. */
  function load(name, keep = false) {
    if (!keep) return get(name);
    let found = read.get(name);
    if (found) read.delete(name); // and back to the end: the first is the longest unused
    else {
      found = get(name);
      found.catch(() => read.delete(name));
    }
    read.set(name, found);
    if (read.size > KEPT) read.delete(read.keys().next().value);
    return found;
  }

  return { load, shard };
})();
