// A headless Chromium driven over its own debugging pipe (Chrome DevTools Protocol), without a library in between.
// The browser is $CHROMIUM, otherwise the one in the npm package @sparticuz/chromium, which needs no installation.

import { execFileSync, spawn } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { brotliDecompressSync } from "node:zlib";

const FLAGS = [
  "--headless",
  "--no-sandbox", // the sandbox refuses root, as in most containers
  "--no-zygote",
  "--disable-gpu",
  "--disable-dev-shm-usage",
  "--hide-scrollbars",
  "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", // the machine alone
  "--remote-debugging-pipe",
];

/** {file, env} of the browser to start. `folder`: where the one of the npm package is unpacked. */
export function findChromium(folder, node_modules) {
  const named = process.env.CHROMIUM;
  if (named !== undefined) {
    if (!existsSync(named)) throw new Error(`expected CHROMIUM to name a file, got ${named}`);
    return { file: named, env: process.env };
  }
  const packed = join(node_modules, "@sparticuz/chromium/bin");
  if (!existsSync(packed)) throw new Error(`expected a browser in ${packed}: \`make web\` fetches it, or set CHROMIUM`);
  const inflate = (name) => brotliDecompressSync(readFileSync(join(packed, name)));
  const file = join(folder, "chromium");
  if (!existsSync(file)) {
    mkdirSync(folder, { recursive: true });
    execFileSync("tar", ["-x", "-C", folder], { input: inflate("al2023.tar.br") }); // NSS, which servers lack
    writeFileSync(file, inflate("chromium.br"), { mode: 0o755 });
  }
  return { file, env: { ...process.env, LD_LIBRARY_PATH: join(folder, "lib") } };
}

/** Starts the browser with one page. */
export async function launch({ file, env }) {
  const profile = mkdtempSync(join(tmpdir(), "gdn2-chromium-"));
  const child = spawn(file, [...FLAGS, `--user-data-dir=${profile}`], {
    env,
    stdio: ["ignore", "ignore", "pipe", "pipe", "pipe"],
  });
  const browser = new Connection(child);
  const { targetId } = await browser.send("Target.createTarget", { url: "about:blank" });
  const { sessionId } = await browser.send("Target.attachToTarget", { targetId, flatten: true });
  const page = new Page(browser, sessionId);
  await Promise.all(["Page", "Runtime", "Log"].map((domain) => page.send(`${domain}.enable`)));
  return {
    page,
    async close() {
      const closed = new Promise((resolve) => child.once("close", resolve));
      browser.send("Browser.close").catch(() => {});
      await closed;
      rmSync(profile, { recursive: true, force: true, maxRetries: 5 });
    },
  };
}

/** Messages end in a zero byte; descriptor 3 takes ours, descriptor 4 gives the browser's. */
class Connection {
  constructor(child) {
    this.waiting = new Map();
    this.listeners = [];
    this.input = child.stdio[3];
    this.noise = "";
    child.stderr.on("data", (text) => (this.noise += text));
    let rest = "";
    child.stdio[4].setEncoding("utf8").on("data", (text) => {
      const messages = (rest + text).split("\0");
      rest = messages.pop();
      messages.forEach((message) => this.receive(JSON.parse(message)));
    });
    const ended = (reason) => {
      const error = new Error(`the browser ended (${reason}):\n${this.noise.slice(-2000)}`);
      for (const { reject } of this.waiting.values()) reject(error);
    };
    child.on("error", (error) => ended(error.message));
    child.on("close", (code, signal) => ended(signal ?? code));
    this.input.on("error", () => {}); // "close" says it
  }

  receive({ id, sessionId, method, params, result, error }) {
    if (id === undefined) return this.listeners.forEach((listener) => listener(method, params, sessionId));
    const { resolve, reject, what } = this.waiting.get(id);
    this.waiting.delete(id);
    if (error) reject(new Error(`${what}: ${error.message}`));
    else resolve(result);
  }

  send(method, params = {}, sessionId = undefined) {
    const id = ++Connection.count;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject, what: method });
      this.input.write(JSON.stringify({ id, method, params, sessionId }) + "\0");
    });
  }
}
Connection.count = 0;

/** What a reader does with a page, and what the page complained about. */
class Page {
  constructor(browser, sessionId) {
    this.send = (method, params) => browser.send(method, params, sessionId);
    this.complaints = [];
    browser.listeners.push((method, params, session) => {
      if (session !== sessionId) return;
      if (method === "Page.loadEventFired") this.onload?.();
      if (method === "Runtime.exceptionThrown") this.complaints.push(params.exceptionDetails.exception?.description);
      if (method === "Runtime.consoleAPICalled" && params.type === "error") {
        this.complaints.push(params.args.map((x) => x.value ?? x.description).join(" "));
      }
      if (method === "Log.entryAdded" && params.entry.level === "error") this.complaints.push(params.entry.text);
    });
  }

  /** Navigates, and returns when the document and its scripts are loaded. */
  async open(url) {
    const loaded = new Promise((resolve) => (this.onload = resolve));
    await this.send("Page.navigate", { url });
    await loaded;
  }

  /** The value of an expression in the page, awaited there. */
  async value(expression) {
    const { result, exceptionDetails } = await this.send("Runtime.evaluate", {
      expression,
      awaitPromise: true,
      returnByValue: true,
    });
    if (exceptionDetails) throw new Error(`${expression}: ${exceptionDetails.exception.description}`);
    return result.value;
  }

  /** Waits until an expression in the page holds. */
  async until(expression, seconds = 60) {
    const end = performance.now() + 1000 * seconds;
    while (!(await this.value(expression))) {
      if (performance.now() > end) {
        const text = await this.value("document.body.innerText");
        throw new Error(`after ${seconds} s still not: ${expression}\ncomplaints: ${this.complaints}\npage:\n${text}`);
      }
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  }

  async type(text) {
    await this.send("Input.insertText", { text });
  }

  async key(key, { code = key, keyCode, text, modifiers = 0 }) {
    const event = { key, code, windowsVirtualKeyCode: keyCode, modifiers };
    await this.send("Input.dispatchKeyEvent", { ...event, type: text === undefined ? "rawKeyDown" : "keyDown", text });
    await this.send("Input.dispatchKeyEvent", { ...event, type: "keyUp" });
  }

  /** A PNG of the page at a width, light or dark. */
  async screenshot({ width, height, scale = 1, dark = false }) {
    const media = [{ name: "prefers-color-scheme", value: dark ? "dark" : "light" }];
    await this.send("Emulation.setEmulatedMedia", { features: media });
    await this.send("Emulation.setDeviceMetricsOverride", {
      width,
      height,
      deviceScaleFactor: scale,
      mobile: width < 600,
    });
    await this.value("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))");
    const { data } = await this.send("Page.captureScreenshot", { format: "png" });
    return Buffer.from(data, "base64");
  }
}
