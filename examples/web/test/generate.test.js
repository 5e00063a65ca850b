// The page's own generate.js and onnxruntime-web, in Node: the bytes of eager PyTorch from every body.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { before, test } from "node:test";
import { pathToFileURL } from "node:url";
import { BODIES, EXPECTED, SITE } from "./expected.js";

const { LanguageModel, generate, mostProbable, sampler, write } = await import(pathToFileURL(`${SITE}/generate.js`));
let ort;

before(async () => {
  ort = await import(pathToFileURL(`${SITE}/onnxruntime-web/ort.wasm.min.mjs`));
  ort.env.wasm.numThreads = 1;
});

const load = (body) => LanguageModel.load(ort, readFileSync(`${SITE}/models/${body}.onnx`));

for (const body of BODIES) {
  test(`${body} writes the bytes of eager`, async () => {
    const model = await load(body);
    assert.equal(model.stateBytes, 4 * (4 * 32 * 32 + 384 * 3) * 4);
    for (const { prompt, bytes } of EXPECTED) {
      const got = [];
      for await (const { token } of generate(model, new TextEncoder().encode(prompt), bytes.length)) got.push(token);
      assert.deepEqual(Uint8Array.from(got), bytes, `after ${JSON.stringify(prompt)}`);
    }
  });
}

test("a prompt in two pieces leaves the state of the whole", async () => {
  const model = await load("scan");
  const prompt = new TextEncoder().encode(EXPECTED[1].prompt);
  const whole = await model.next(prompt, model.emptyState());
  const first = await model.next(prompt.subarray(0, 5), model.emptyState());
  const both = await model.next(prompt.subarray(5), first.state);
  assert.equal(mostProbable(both.logits), mostProbable(whole.logits));
  whole.state.forEach(({ data }, i) => {
    const difference = data.map((x, j) => Math.abs(x - both.state[i].data[j]));
    assert.ok(Math.max(...difference) < 1e-5, model.present[i]);
  });
});

/** A model that recites bytes; its state is how many it has said. */
class Reciter {
  constructor(bytes) {
    this.bytes = bytes;
  }
  emptyState() {
    return 0;
  }
  async next(_, state) {
    const logits = new Float32Array(256);
    logits[this.bytes[state]] = 1;
    return { logits, state: state + 1 };
  }
}

async function frames(bytes, count, options) {
  const found = [];
  for await (const frame of write(new Reciter(bytes), "x", count, options)) found.push(frame);
  return found;
}

test("text comes in whole characters, however the bytes fall into frames", async () => {
  const text = "aé–日😀z";
  const bytes = new TextEncoder().encode(text);
  const found = await frames(bytes, bytes.length, { frameMs: 0 });
  assert.equal(found.length, bytes.length + 1);
  assert.deepEqual(found.map((frame) => frame.text).filter(Boolean), [...text]);
  assert.deepEqual(
    found.map((frame) => frame.end),
    [...Array(bytes.length).fill(null), "done"],
  );
  const cut = await frames(bytes, bytes.length - 2, { frameMs: 0 });
  assert.equal(cut.map((frame) => frame.text).join(""), "aé–日\ufffd");
});

test("a byte is drawn with the probabilities of the softmax", () => {
  const logits = Float32Array.of(500, 500 + Math.log(2), -Infinity, 500); // 1/4, 1/2, 0, 1/4
  const draw = (temperature, x) => sampler(temperature, () => x)(logits);
  assert.deepEqual(
    [0, 0.24, 0.26, 0.74, 0.76, 1 - 2 ** -53].map((x) => draw(1, x)),
    [0, 0, 1, 1, 3, 3],
  );
  assert.deepEqual([draw(0, 0.9), draw(0.01, 0.01), draw(0.01, 0.99)], [1, 1, 1]);
  assert.equal(draw(0.5, 0.16), 0); // 1/6, 4/6, 0, 1/6
  assert.equal(draw(0.5, 0.17), 1);
});

test("a stop ends the run at the next frame", async () => {
  let shown = 0;
  const found = await frames(new Uint8Array(100).fill(97), 100, { frameMs: 0, stopped: () => ++shown === 3 });
  assert.deepEqual(
    found.map(({ written, end }) => [written, end]),
    [
      [1, null],
      [2, null],
      [3, null],
      [3, "stopped"],
    ],
  );
});

test("messages get their turn between frames", async () => {
  let stop = false;
  setTimeout(() => (stop = true), 5);
  const found = await frames(new Uint8Array(1e6).fill(97), 1e6, { frameMs: 0, stopped: () => stop });
  assert.equal(found.at(-1).end, "stopped");
});

test("an empty prompt and a file of another kind are refused", async () => {
  await assert.rejects(async () => {
    for await (const _ of generate(new Reciter([]), new Uint8Array(), 3));
  }, /at least one byte/);
  await assert.rejects(LanguageModel.load(ort, new TextEncoder().encode("not a model")));
  const session = { inputNames: ["x"], outputNames: ["y"] };
  assert.throws(() => new LanguageModel(ort, session), /expected input_ids and states .* got x to y/);
});
