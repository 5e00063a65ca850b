// The model, away from the page: a long run blocks neither typing nor the stop button.
//   in:   {load: body}   {generate: {prompt, count, temperature}}   {stop: true}
//   out:  {loaded}   {progress}, the last one with its `end`   {failed}

import * as ort from "./onnxruntime-web/ort.wasm.min.mjs";
import { LanguageModel, sampler, write } from "./generate.js";

ort.env.wasm.numThreads = 1; // more need headers that make the page cross-origin isolated
ort.env.wasm.wasmPaths = new URL("./onnxruntime-web/", import.meta.url).href;

let model = null;
let stopped = false;

self.onmessage = async ({ data: { load, generate, stop } }) => {
  if (stop) {
    stopped = true;
    return;
  }
  try {
    if (load) await loadModel(load);
    if (generate) await run(generate);
  } catch (error) {
    self.postMessage({ failed: error.message ?? String(error) });
  }
};

async function loadModel(body) {
  model = null;
  const file = `models/${body}.onnx`;
  const response = await fetch(file);
  if (!response.ok)
    throw new Error(`${file}: ${response.status} ${response.statusText}. \`make web\` writes this file.`);
  const bytes = new Uint8Array(await response.arrayBuffer());
  try {
    model = await LanguageModel.load(ort, bytes);
  } catch (error) {
    throw new Error(`${file}: ${error.message ?? error}`);
  }
  self.postMessage({ loaded: { body, fileBytes: bytes.length, stateBytes: model.stateBytes } });
}

async function run({ prompt, count, temperature }) {
  stopped = false;
  const options = { choose: sampler(temperature), stopped: () => stopped };
  for await (const { state, ...frame } of write(model, prompt, count, options)) {
    self.postMessage({ progress: { ...frame, state: recurrent(state) } });
  }
}

/** Copies of the matrices between tokens, one per layer, [heads, K, V]. */
function recurrent(state) {
  return state.flatMap((tensor, i) => {
    const isMatrix = model.past[i].name.endsWith(".recurrent");
    return isMatrix ? [{ data: tensor.data.slice(), sizes: tensor.dims.slice(1) }] : [];
  });
}
