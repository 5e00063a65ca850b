// The page: what the worker says becomes text, numbers and a picture of the state.

import { drawState } from "./state.js";

const [form, prompt, count, temperature, body, generateButton, stopButton] = //
  ["form", "prompt", "count", "temperature", "body", "generate", "stop"].map((id) => document.getElementById(id));
const [status, error, text, given, written, canvas, stateNote] = //
  ["status", "error", "text", "given", "written", "state", "state-note"].map((id) => document.getElementById(id));
const [decode, prefill, progress] = ["decode", "prefill", "progress"].map((id) => document.getElementById(id));

const number = new Intl.NumberFormat("en");
const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
let phase = "loading"; // then ready, busy or failed
let task = null;
let lastState = null;

worker.onmessage = ({ data: { loaded, progress: news, failed } }) => {
  if (loaded) onLoaded(loaded);
  if (news) onProgress(news);
  if (failed) fail(failed);
};
worker.onerror = (event) => {
  event.preventDefault();
  fail(`${event.message ?? "the worker did not start"}. \`make web\` writes the page with ONNX Runtime next to it.`);
};

form.onsubmit = (event) => {
  event.preventDefault();
  if (phase !== "ready") return;
  task = { prompt: prompt.value, count: Number(count.value), temperature: Number(temperature.value) };
  given.textContent = task.prompt;
  written.textContent = "";
  enter("busy", "Reading the prompt.");
  worker.postMessage({ generate: task });
};
stopButton.onclick = stop;
body.onchange = load;
document.onkeydown = (event) => {
  if (event.key === "Escape") stop();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
};
matchMedia("(prefers-color-scheme: dark)").onchange = () => lastState && drawState(canvas, lastState);
load();

function load() {
  enter("loading", "Loading ONNX Runtime and the model.");
  worker.postMessage({ load: body.value });
}

function stop() {
  if (phase === "busy") worker.postMessage({ stop: true });
}

function onLoaded({ fileBytes, stateBytes }) {
  stateNote.textContent =
    `${kilobytes(stateBytes)} for any length of text: one matrix for each head (across) and layer (down), with the ` +
    "last columns of the convolutions.";
  enter("ready", `Ready: a model of ${kilobytes(fileBytes)}.`);
}

function onProgress({ text: piece, written: bytes, prefillMs, decodeMs, state, end }) {
  const follows = text.scrollTop + text.clientHeight >= text.scrollHeight - 8;
  written.textContent += piece;
  if (follows) text.scrollTop = text.scrollHeight;
  lastState = state;
  drawState(canvas, state);
  const read = new TextEncoder().encode(task.prompt).length;
  const perSecond = bytes > 1 ? number.format(Math.round((1000 * (bytes - 1)) / decodeMs)) : "–";
  decode.textContent = `${perSecond} bytes/s`;
  prefill.textContent = `${number.format(read)} bytes in ${number.format(Math.round(prefillMs))} ms`;
  progress.textContent = `${number.format(bytes)} of ${number.format(task.count)} bytes`;
  if (end === null) status.textContent = "Writing.";
  else
    enter("ready", `${end === "stopped" ? "Stopped" : "Done"}: ${number.format(bytes)} bytes, ${perSecond} a second.`);
}

function fail(message) {
  enter("failed", "");
  error.textContent = `The model cannot run. ${message}`;
  error.hidden = false;
}

function enter(next, line) {
  phase = next;
  status.textContent = line;
  error.hidden = true;
  generateButton.setAttribute("aria-disabled", String(next !== "ready"));
  stopButton.setAttribute("aria-disabled", String(next !== "busy"));
  body.disabled = next === "busy" || next === "loading";
  written.classList.toggle("busy", next === "busy");
}

function kilobytes(bytes) {
  return bytes < 1e6 ? `${number.format(Math.round(bytes / 1024))} KB` : `${(bytes / 1e6).toFixed(1)} MB`;
}
