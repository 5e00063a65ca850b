// The bodies of the operator in onnxruntime-web against each other, in interleaved rounds: medians as ratios.

import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";
import { BODIES, SITE } from "./expected.js";

const { LanguageModel } = await import(pathToFileURL(`${SITE}/generate.js`));
const ort = await import(pathToFileURL(`${SITE}/onnxruntime-web/ort.wasm.min.mjs`));
ort.env.wasm.numThreads = 1;

const [ROUNDS, PREFILL, STEPS] = [9, 512, 40];
const text = readFileSync(`${SITE}/generate.js`).subarray(0, PREFILL);
const rows = [];
for (const body of BODIES) {
  const model = await LanguageModel.load(ort, readFileSync(`${SITE}/models/${body}.onnx`));
  rows.push({ body, model, prefill: [], decode: [] });
}
for (let round = 0; round <= ROUNDS; round++) {
  for (const row of rows) {
    const began = performance.now();
    let { state } = await row.model.next(text, row.model.emptyState());
    const read = performance.now();
    for (let i = 0; i < STEPS; i++) ({ state } = await row.model.next(text.subarray(i, i + 1), state));
    if (round === 0) continue; // warm-up
    row.prefill.push(read - began);
    row.decode.push((performance.now() - read) / STEPS);
  }
}

const median = (values) => values.toSorted((x, y) => x - y)[values.length >> 1];
console.log(`onnxruntime-web ${ort.env.versions.web}, Node ${process.version}, one thread; median of ${ROUNDS} rounds`);
for (const row of rows) {
  const ratio = (kind) => (median(row[kind]) / median(rows[0][kind])).toFixed(2);
  console.log(
    `${row.body.padEnd(17)} prefill of ${PREFILL} bytes ${median(row.prefill).toFixed(1)} ms (x ${ratio("prefill")}), ` +
      `step ${median(row.decode).toFixed(2)} ms (x ${ratio("decode")})`,
  );
}
