// What every test needs of the site that `make web` wrote.

import { readFileSync } from "node:fs";
import { resolve } from "node:path";

export const SITE = resolve(process.env.SITE ?? "build/web");
export const BODIES = ["linear_attention", "scan", "chunk"];

/** [{prompt, bytes}] of the model in eager PyTorch. */
export const EXPECTED = JSON.parse(readFileSync(`${SITE}/expected.json`, "utf8")).map(({ prompt, bytes }) => ({
  prompt,
  bytes: Uint8Array.from(bytes),
  text: new TextDecoder().decode(Uint8Array.from(bytes)),
}));
