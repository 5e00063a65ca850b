// The page itself, driven in a headless Chromium by the keyboard, from the server of `make web-serve`, with no way out
// of this machine: what it shows is the text of eager PyTorch.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdirSync, mkdtempSync, readdirSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { after, before, test } from "node:test";
import { findChromium, launch } from "./chromium.js";
import { BODIES, EXPECTED, SITE } from "./expected.js";

const CONTROL = 2;
const STATUS = "document.getElementById('status').textContent";
const READY = `/^(Ready|Done|Stopped)/.test(${STATUS})`;
const ERROR = "document.getElementById('error')";
const sites = [];
const servers = [];
let browser;
let page;

before(async () => {
  const here = import.meta.dirname;
  browser = await launch(findChromium(resolve("build/chromium"), join(here, "../node_modules")));
  page = browser.page;
});

after(async () => {
  await browser?.close();
  servers.forEach((server) => server.kill());
  sites.forEach((site) => rmSync(site, { recursive: true }));
});

/** The address of a folder, served as `make web-serve` does. */
async function serve(folder) {
  const server = spawn(process.env.PYTHON ?? "python3", [
    "-u",
    "-m",
    "http.server",
    "-b",
    "127.0.0.1",
    "-d",
    folder,
    "0",
  ]);
  servers.push(server);
  let said = "";
  return new Promise((found, failed) => {
    server.on("error", failed);
    server.on("close", (code) => failed(new Error(`the server ended (${code}): ${said}`)));
    server.stdout.on("data", (text) => {
      const port = /port (\d+)/.exec((said += text))?.[1];
      if (port) found(`http://127.0.0.1:${port}/`);
    });
  });
}

/** A copy of the site by links, with other models. */
function siteWith(models) {
  const folder = mkdtempSync(join(tmpdir(), "gdn2-web-"));
  sites.push(folder);
  for (const name of readdirSync(SITE)) if (name !== "models") symlinkSync(join(SITE, name), join(folder, name));
  mkdirSync(join(folder, "models"));
  for (const [name, bytes] of Object.entries(models)) writeFileSync(join(folder, "models", name), bytes);
  return folder;
}

async function enterPrompt(prompt, count) {
  await page.value(`document.getElementById('count').value = ${count}`);
  await page.value("document.getElementById('temperature').value = 0");
  await page.value("document.getElementById('prompt').select(); document.getElementById('prompt').focus()");
  await page.type(prompt);
  await page.key("Enter", { keyCode: 13, modifiers: CONTROL });
}

const written = () => page.value("document.getElementById('written').textContent");

test("the page writes the text of eager with every body", async () => {
  await page.open(await serve(SITE));
  await page.until(READY);
  assert.match(await page.value(STATUS), /Ready: a model of 4\.0 MB/);
  for (const body of BODIES) {
    const select = `const s = document.getElementById('body'); s.value = '${body}'; s.dispatchEvent(new Event('change'))`;
    await page.value(`{ ${select} }`);
    await page.until(READY);
    for (const { prompt, text, bytes } of EXPECTED) {
      await enterPrompt(prompt, bytes.length);
      await page.until(`${STATUS}.startsWith('Done: ${bytes.length} bytes')`);
      assert.equal(await written(), text, `${body} after ${JSON.stringify(prompt)}`);
      assert.equal(await page.value("document.getElementById('given').textContent"), prompt);
    }
  }
  assert.match(await page.value("document.getElementById('decode').textContent"), /^[\d,]+ bytes\/s$/);
  const painted = "document.getElementById('state').getContext('2d').getImageData(0, 0, 138, 138).data.some((x) => x)";
  assert.ok(await page.value(painted));
  assert.deepEqual(page.complaints, []);
});

test("text appears while the model writes, Escape stops it, and the page goes on", async () => {
  const [{ prompt, bytes, text }] = EXPECTED;
  await enterPrompt(prompt, 4096);
  await page.until("document.getElementById('written').textContent.length > 4");
  assert.equal(await page.value(STATUS), "Writing.");
  await page.key("Escape", { keyCode: 27 });
  await page.until(READY);
  const [, count] = /^Stopped: ([\d,]+) bytes/.exec(await page.value(STATUS));
  assert.ok(Number(count.replace(",", "")) < 4096);
  assert.ok((await written()).startsWith(text.slice(0, 5)));
  await enterPrompt(prompt, bytes.length);
  await page.until(`${STATUS}.startsWith('Done')`);
  assert.equal(await written(), text);
  assert.deepEqual(page.complaints, []);
});

test("a missing model and a broken one are errors that name the file, and another body still runs", async () => {
  const [{ prompt, bytes, text }] = EXPECTED;
  const site = siteWith({ "scan.onnx": "not a model" });
  symlinkSync(join(SITE, "models/chunk.onnx"), join(site, "models/chunk.onnx"));
  await page.open(await serve(site));
  await page.until(`${ERROR}.checkVisibility()`);
  const error = () => page.value(`${ERROR}.textContent`);
  assert.match(await error(), /models\/linear_attention\.onnx: 404 .*`make web` writes this file/);
  assert.equal(await page.value("document.getElementById('generate').getAttribute('aria-disabled')"), "true");
  const choose = (body) =>
    page.value(
      `{ const s = document.getElementById('body'); s.value = '${body}'; s.dispatchEvent(new Event('change')) }`,
    );
  await choose("scan");
  await page.until(`${ERROR}.textContent.includes('models/scan.onnx: ')`);
  await choose("chunk");
  await page.until(READY);
  assert.equal(await page.value(`${ERROR}.checkVisibility()`), false);
  await enterPrompt(prompt, bytes.length);
  await page.until(`${STATUS}.startsWith('Done')`);
  assert.equal(await written(), text);
});

test("without ONNX Runtime next to it the page says so", async () => {
  const site = siteWith({});
  rmSync(join(site, "onnxruntime-web"));
  await page.open(await serve(site));
  await page.until(`${ERROR}.checkVisibility()`);
  assert.match(await page.value(`${ERROR}.textContent`), /make web/);
});

test("every control has a name and the tab key reaches it", async () => {
  await page.open(await serve(SITE));
  await page.until(READY);
  await page.value("document.getElementById('prompt').focus()");
  const reached = [];
  for (let i = 0; i < 7; i++) {
    reached.push(await page.value("document.activeElement.id"));
    await page.key("Tab", { keyCode: 9 });
  }
  assert.deepEqual(reached, ["prompt", "count", "temperature", "body", "generate", "stop", "text"]);
  const { nodes } = await page.send("Accessibility.getFullAXTree");
  const roles = ["textbox", "spinbutton", "combobox", "button", "image"];
  const controls = nodes.filter(({ role }) => roles.includes(role?.value));
  const names = ["Prompt", "Bytes to write", "Temperature", "Operator body", "Generate", "Stop"];
  assert.deepEqual(
    new Set(controls.map(({ name }) => name.value)),
    new Set([...names, "The matrices of every layer and head, live"]),
  );
});

test("a phone needs no sideways scrolling", async () => {
  await page.screenshot({ width: 360, height: 740 });
  const { scrollWidth, clientWidth } = await page.value(
    "(({ scrollWidth, clientWidth }) => ({ scrollWidth, clientWidth }))(document.documentElement)",
  );
  assert.equal(scrollWidth, clientWidth);
});
