"use strict";
// The page: a state in the address, a request for it, four panels that fill as lines of JSON come. What a model writes
// enters the page as text nodes only.

const $ = (id) => document.getElementById(id);
const TITLES = { vector: "θₙ", base: "base", random: "random direction", unsteered: "unsteered" };
const panels = {};
let known, request;

// Characters that turn writing around or cannot be seen are shown as their code points.
function visible(text) {
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g,
    (c) => "⟨U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "⟩");
}

const short = (value) => Number(value.toPrecision(3)).toString();

function clamp(value, low, high, otherwise) {
  const number = Number(value);
  return value === null || value === "" || !Number.isFinite(number) ? otherwise : Math.min(Math.max(number, low), high);
}

// The state that an address names; what it leaves out or gets wrong is the default.
function read() {
  const given = new URLSearchParams(location.hash.slice(1));
  const names = Object.keys(known.concepts);
  const concept = names.includes(given.get("concept")) ? given.get("concept") : names[0];
  const { norms, prompt } = known.concepts[concept];
  const n = Math.round(clamp(given.get("n"), 0, norms.length - 1, Math.min(1, norms.length - 1)));
  return {
    concept, n,
    norm: clamp(given.get("norm"), 0, highest(concept), null),
    length: Math.round(clamp(given.get("length"), 1, known.most_tokens, 48)),
    prompt: given.get("prompt") ?? prompt,
  };
}

const highest = (concept) => 2 * Math.max(...known.concepts[concept].norms);

function show(state) {
  const { norms } = known.concepts[state.concept];
  const norm = state.norm ?? norms[state.n];
  $("concept").value = state.concept;
  for (const id of ["n", "chain"]) Object.assign($(id), { max: norms.length - 1, value: state.n });
  $("of").value = `of ${norms.length - 1}`;
  Object.assign($("norm"), { max: highest(state.concept), step: highest(state.concept) / 200, value: norm });
  $("norm-told").value = short(norm) + (state.norm === null ? " (its own)" : ` (its own: ${short(norms[state.n])})`);
  Object.assign($("length"), { max: known.most_tokens, value: state.length });
  if ($("prompt").value !== state.prompt) $("prompt").value = state.prompt;
}

// Change the state: the address follows, and what was being written for the last one stops.
function change(part) {
  const before = read();
  const state = { ...before, ...part };
  if (state.concept !== before.concept) {
    // Another concept has other norms; a prompt that was not typed is its own.
    state.norm = null;
    state.n = Math.min(state.n, known.concepts[state.concept].norms.length - 1);
    if (before.prompt === known.concepts[before.concept].prompt) state.prompt = known.concepts[state.concept].prompt;
  }
  const address = new URLSearchParams({ concept: state.concept, n: state.n, length: state.length, prompt: state.prompt });
  if (state.norm !== null) address.set("norm", state.norm);
  history.replaceState(null, "", "#" + address);
  act();
}

function act() {
  const state = read();
  show(state);
  request?.abort();
  request = new AbortController();
  const { signal } = request;
  document.body.dataset.state = "writing";
  $("said").textContent = "writing …";
  setTimeout(() => write(state, signal).catch((error) => signal.aborted || end(error.message)), 150);
}

function end(said) {
  $("said").textContent = said;
  document.body.dataset.state = "ready";
}

async function write(state, signal) {
  if (signal.aborted) return;
  for (const name of Object.keys(TITLES)) clear(name);
  const { concept, n, norm, prompt, length } = state;
  const answer = await fetch("write", {
    method: "POST", signal, headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ concept, n, norm, prompt, length }),
  });
  if (!answer.ok) return end((await answer.json()).error);
  let left = "", error = "";
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const lines = (left + part.value).split("\n");
    left = lines.pop();
    for (const line of lines.map(JSON.parse)) error = line.error ?? (put(line, state), error);
  }
  if (!signal.aborted) end(error);
}

function clear(name) {
  const panel = panels[name];
  for (const part of ["text", "rows", "quiet"]) panel[part].textContent = "";
}

function put(line, state) {
  const panel = panels[line.name];
  if ("norm" in line) {
    panel.title.textContent = line.name === "vector" ? `θₙ, ${state.concept} n = ${state.n}` : TITLES[line.name];
    panel.quiet.textContent = `norm ${short(line.norm)}`;
  } else if ("tokens" in line) {
    panel.quiet.textContent += `, KL from base ${short(line.kl_from_base)} nats`;
    panel.rows.replaceChildren(...line.tokens.map(row));
  } else {
    panel.text.textContent = visible(line.text) + (line.finish_reason === "length" ? " …" : "");
  }
}

function row([token, probability]) {
  const meter = document.createElement("meter");
  meter.value = probability;
  const cells = [visible(JSON.stringify(token).slice(1, -1).replace(/ /g, "␣")), meter, (100 * probability).toFixed(1) + " %"];
  const line = document.createElement("tr");
  for (const cell of cells) line.appendChild(document.createElement("td")).append(cell);
  return line;
}

function build() {
  for (const name of Object.keys(TITLES)) {
    const section = $("panel").content.cloneNode(true).firstElementChild;
    section.id = name;
    const [title, quiet, text, rows] = ["h2", "p", "pre", "tbody"].map((tag) => section.querySelector(tag));
    panels[name] = { title, quiet, text, rows };
    title.textContent = TITLES[name];
    $("panels").append(section);
  }
  for (const name of Object.keys(known.concepts)) $("concept").add(new Option(name, name));
  const { run, model, layer } = known.facts;
  $("facts").textContent = `run ${run} · ${model} · added to the output of layer ${layer} · greedy texts`;
}

function listen() {
  $("concept").addEventListener("change", () => change({ concept: $("concept").value }));
  for (const id of ["n", "chain"]) {
    $(id).addEventListener("input", () => change({ n: Math.round(clamp($(id).value, 0, $(id).max, read().n)) }));
  }
  $("norm").addEventListener("input", () => change({ norm: Number($("norm").value) }));
  $("own").addEventListener("click", () => change({ norm: null }));
  $("length").addEventListener("change", () => change({ length: Math.round(clamp($("length").value, 1, known.most_tokens, 48)) }));
  $("prompt").addEventListener("change", () => change({ prompt: $("prompt").value }));
  $("controls").addEventListener("submit", (event) => {
    event.preventDefault();
    change({ prompt: $("prompt").value });
  });
  addEventListener("hashchange", act);
}

fetch("state").then((answer) => answer.json()).then((state) => {
  known = state;
  build();
  listen();
  act();
}).catch((error) => end(error.message));
