// Bytes and text from an exported language model: prefill once, then one byte at a time with the state fed back.
// For browsers, workers and Node; onnxruntime-web is handed in.

const FRAME_MS = 16;

/** An ONNX file of `gdn2 export`: input_ids and states to logits and as many states, in the same order. */
export class LanguageModel {
  /**
   * @param ort the module onnxruntime-web.
   * @param {Uint8Array} file the bytes of the file.
   * @throws {Error} ONNX Runtime refuses the file, or its inputs and outputs are others.
   */
  static async load(ort, file) {
    return new LanguageModel(ort, await ort.InferenceSession.create(file, { executionProviders: ["wasm"] }));
  }

  constructor(ort, session) {
    const { inputNames, outputNames } = session;
    if (inputNames[0] !== "input_ids" || outputNames[0] !== "logits" || inputNames.length !== outputNames.length) {
      throw new Error(
        `expected input_ids and states to logits and as many states, got ${inputNames} to ${outputNames}`,
      );
    }
    this.ort = ort;
    this.session = session;
    this.past = session.inputMetadata.slice(1).map(({ name, shape }) => {
      const sizes = shape.map((size) => (typeof size === "number" ? size : 1)); // the batch
      return { name, sizes, length: sizes.reduce((product, size) => product * size, 1) };
    });
    this.present = outputNames.slice(1);
  }

  /** Bytes of memory between two tokens, whatever came before them. */
  get stateBytes() {
    return this.past.reduce((sum, { length }) => sum + 4 * length, 0);
  }

  emptyState() {
    return this.past.map(({ sizes, length }) => new this.ort.Tensor("float32", new Float32Array(length), sizes));
  }

  /**
   * @param {Uint8Array} tokens at least one.
   * @returns {Promise<{logits: Float32Array, state: Array}>} of the next byte, and the state after the tokens.
   */
  async next(tokens, state) {
    const ids = BigInt64Array.from(tokens, BigInt);
    const feeds = { input_ids: new this.ort.Tensor("int64", ids, [1, ids.length]) };
    this.past.forEach(({ name }, i) => (feeds[name] = state[i]));
    const results = await this.session.run(feeds);
    const { data, dims } = results.logits;
    return { logits: data.subarray(-dims[2]), state: this.present.map((name) => results[name]) };
  }
}

/**
 * Yields `count` bytes, each fed back, and the state before each.
 *
 * @param {LanguageModel} model or anything with its emptyState() and next().
 * @param {Uint8Array} prompt
 * @param {(logits: Float32Array) => number} choose the next byte; by default the most probable one.
 * @throws {Error} the prompt is empty.
 */
export async function* generate(model, prompt, count, choose = mostProbable) {
  if (prompt.length === 0) throw new Error("expected a prompt of at least one byte, got none");
  let { logits, state } = await model.next(prompt, model.emptyState());
  for (let i = 0; i < count; i++) {
    const token = choose(logits);
    yield { token, state };
    if (i + 1 < count) ({ logits, state } = await model.next(Uint8Array.of(token), state));
  }
}

export function mostProbable(logits) {
  return logits.indexOf(logits.reduce((most, x) => Math.max(most, x)));
}

/** A choice with probabilities softmax(logits / temperature); temperature 0 is the most probable. */
export function sampler(temperature, random = Math.random) {
  if (temperature === 0) return mostProbable;
  return (logits) => {
    const most = logits[mostProbable(logits)];
    const weights = Float64Array.from(logits, (x) => Math.exp((x - most) / temperature));
    let rest = random() * weights.reduce((sum, x) => sum + x, 0);
    const chosen = weights.findIndex((x) => (rest -= x) < 0);
    return chosen === -1 ? mostProbable(logits) : chosen; // rounding left a rest
  };
}

/**
 * Generates text and yields it once a frame: {text, written, prefillMs, decodeMs, state, end}. `text` is new since the
 * frame before and ends with a whole character, `written` counts all bytes, `end` is null, in the last one "done" or
 * "stopped". Between frames waiting messages and timers get their turn.
 *
 * @param {string} prompt
 * @param {{choose?: (logits: Float32Array) => number, stopped?: () => boolean, frameMs?: number}} options
 */
export async function* write(model, prompt, count, { choose, stopped = () => false, frameMs = FRAME_MS } = {}) {
  const decoder = new TextDecoder();
  const began = performance.now();
  let prefillMs = null;
  let shown = began;
  let written = 0;
  let fresh = [];
  let state = null;
  const frame = (end) => {
    const text = decoder.decode(Uint8Array.from(fresh), { stream: end === null });
    fresh = [];
    return { text, written, prefillMs, decodeMs: performance.now() - began - prefillMs, state, end };
  };
  for await (const next of generate(model, new TextEncoder().encode(prompt), count, choose)) {
    prefillMs ??= performance.now() - began;
    state = next.state;
    fresh.push(next.token);
    written++;
    if (performance.now() - shown < frameMs) continue;
    yield frame(null);
    await turn();
    if (stopped()) break;
    shown = performance.now();
  }
  yield frame(written < count ? "stopped" : "done");
}

/** Lets waiting messages in; a timer of 0 ms would take 4. */
function turn() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}
