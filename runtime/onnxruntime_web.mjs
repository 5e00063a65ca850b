// One ONNX file in onnxruntime-web, driven over pipes: node onnxruntime_web.mjs MODULE FILE.
//
// A message is the length of a header in 4 bytes, the header in JSON, and the bytes of its tensors one after the other.
// First the ports are written; then each message of inputs is answered by one of outputs, or of an error.

import { readFileSync, readSync, writeSync } from "node:fs";
import { pathToFileURL } from "node:url";

const ARRAYS = {
  float32: Float32Array,
  float64: Float64Array,
  float16: globalThis.Float16Array ?? Uint16Array,
  int64: BigInt64Array,
  int32: Int32Array,
  bool: Uint8Array,
};
const IN = 0;
const OUT = 1;

function read(length) {
  const bytes = Buffer.alloc(length);
  for (let at = 0; at < length; ) {
    const count = readSync(IN, bytes, at, length - at);
    if (count === 0) process.exit(0); // the caller is gone
    at += count;
  }
  return bytes;
}

function write(bytes) {
  for (let at = 0; at < bytes.length; ) at += writeSync(OUT, bytes, at);
}

function send(header, tensors = []) {
  const text = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(4);
  length.writeUInt32LE(text.length);
  write(Buffer.concat([length, text]));
  for (const { data } of tensors) write(Buffer.from(data.buffer, data.byteOffset, data.byteLength));
}

const ports = (metadata) => metadata.map(({ name, type, shape }) => ({ name, type, shape }));

try {
  const ort = await import(pathToFileURL(process.argv[2]));
  ort.env.wasm.numThreads = 1;
  const session = await ort.InferenceSession.create(readFileSync(process.argv[3]), { executionProviders: ["wasm"] });
  send({ inputs: ports(session.inputMetadata), outputs: ports(session.outputMetadata) });
  for (;;) {
    const header = JSON.parse(read(read(4).readUInt32LE()));
    const feeds = {};
    for (const { name, type, dims, size } of header.tensors) {
      const bytes = read(size);
      const data = new ARRAYS[type](bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + size));
      feeds[name] = new ort.Tensor(type, data, dims);
    }
    try {
      const results = await session.run(feeds);
      const tensors = session.outputNames.map((name) => results[name]);
      send({ tensors: tensors.map(({ type, dims, data }) => ({ type, dims, size: data.byteLength })) }, tensors);
    } catch (error) {
      send({ error: error.message });
    }
  }
} catch (error) {
  send({ error: error.message });
}
