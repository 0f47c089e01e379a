"use strict";
// Every text of a model reaches the page through textContent: nothing in it can become markup or script.
const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
const FIGURES = JSON.parse($("#figures").textContent);
const CONCEPTS = $$("[role=tab]").map((tab) => tab.dataset.concept);
const PAGE = 100;
const loaded = new Map();
const state = { concept: null, data: null, kind: "chain", at: 0, shown: PAGE };

function node(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children.map((child) => (child instanceof Node ? child : document.createTextNode(String(child)))));
  return element;
}

// Characters that turn writing around or cannot be seen are shown as their code points.
function visible(text) {
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g,
    (c) => "⟨U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "⟩");
}

function number(value, digits = 3) {
  return value === null || value === undefined ? "–" : Number(value.toPrecision(digits)).toString();
}

/* figures */

function themed(layout) {
  const css = getComputedStyle(document.documentElement);
  const colour = (name) => css.getPropertyValue(name).trim();
  const axis = (own = {}) => ({ ...own, gridcolor: colour("--grid"), linecolor: colour("--line"), automargin: true });
  return {
    ...layout, autosize: true, xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis),
    font: { ...layout.font, color: colour("--quiet"), family: getComputedStyle(document.body).fontFamily },
    hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--text") } },
  };
}

const CONFIG = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };

function figureOf(element) {
  const name = element.dataset.plot;
  return name === "comparison" ? FIGURES.comparison : FIGURES.concepts[element.closest(".concept").dataset.concept][name];
}

async function draw(element) {
  const figure = figureOf(element);
  await Plotly.react(element, figure.data, themed(figure.layout), CONFIG);
  if (element.dataset.drawn) return;
  element.dataset.drawn = "yes";
  if (["kl", "norm", "generalization"].includes(element.dataset.plot)) {
    element.on("plotly_click", (event) => go("chain", event.points[0].x));
    pointAt(element);
  }
}

function pointAt(element) {
  const here = state.kind === "chain" && stop() ? stop().n : null;
  const line = { type: "line", yref: "paper", y0: 0, y1: 1, x0: here, x1: here, line: { width: 1, color: "#94a3b8" } };
  Plotly.relayout(element, { shapes: here === null ? [] : [line] });
}

const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries.filter((e) => e.isIntersecting)) {
    watcher.unobserve(entry.target);
    draw(entry.target);
  }
}, { rootMargin: "300px" });

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => $$(".plot[data-drawn]").forEach(draw));

/* data */

async function load(concept) {
  if (!loaded.has(concept)) loaded.set(concept, unpack(concept));
  return loaded.get(concept);
}

async function unpack(concept) {
  const stream = new Blob([bytesOf($("#texts-" + concept).textContent)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return index(JSON.parse(await new Response(stream).text()));
}

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

// `stops`: for each kind the directions in order of n, with their numbers; `rows`: where the texts of each stand.
function index({ vectors, texts, prompts, left_out }) {
  const stops = new Map(), rows = new Map();
  const groups = {};
  vectors.n.forEach((n, i) => (groups[vectors.kind[i]] ??= []).push({ kind: vectors.kind[i], n, i }));
  const chain = [...(groups.base ?? []), ...(groups.chain ?? [])];
  if (chain.length) stops.set("chain", chain);
  for (const kind of Object.keys(groups)) if (!["base", "chain"].includes(kind)) stops.set(kind, groups[kind]);
  texts.n.forEach((n, i) => {
    const key = texts.kind[i] + "/" + n;
    rows.has(key) ? rows.get(key).push(i) : rows.set(key, [i]);
  });
  const lower = texts.text.map((text) => text.toLowerCase());
  return { vectors, texts, prompts, left_out, stops, rows, lower };
}

/* explorer */

const stops = () => state.data.stops.get(state.kind) ?? [];
const stop = () => state.data && stops()[state.at];

function go(kind, n) {
  if (!state.data || !state.data.stops.has(kind)) return;
  state.kind = kind;
  const list = stops();
  // The nearest there is: a vector may have failed, and a person may type any number.
  const far = (i) => Math.abs(list[i].n - n);
  state.at = list.reduce((best, _, i) => (far(i) < far(best) ? i : best), 0);
  show();
}

function step(by) {
  if (!state.data) return;
  state.at = Math.max(0, Math.min(stops().length - 1, state.at + by));
  show();
}

function show() {
  const here = stop();
  if (!here) return;
  $("#kind").value = state.kind;
  $("#slider").max = stops().length - 1;
  $("#slider").value = state.at;
  $("#n").value = here.n;
  history.replaceState(null, "", `#${state.concept}/${state.kind}/${here.n}`);
  showNumbers(here);
  showOutputs(here);
  $$(`#concept-${state.concept} .plot[data-drawn]`)
    .filter((element) => ["kl", "norm"].includes(element.dataset.plot)).forEach(pointAt);
}

function showNumbers({ kind, n, i }) {
  const v = state.data.vectors, entry = (name, value) => node("div", "", node("dt", "", name), node("dd", "", value));
  $("#numbers").replaceChildren(
    entry("direction", kind === "chain" ? `n = ${n}` : `${kind} ${n}`),
    entry("‖θ‖", number(v.norm[i])),
    entry("KL from base, nats", number(v.kl_from_base[i])),
    entry("KL to base, nats", number(v.kl_to_base[i])),
    entry("KL from unsteered, nats", number(v.kl_from_unsteered[i])),
    entry("loss", number(v.loss[i])),
    entry("relative loss", number(v.relative_loss[i])),
    entry("largest |cos|", number(v.max_abs_cos[i], 2)),
    entry("evaluations", v.evaluations[i] ?? "–"),
    entry("stopped because", v.stop_reason[i] ?? "–"),
    entry("cos with mean difference", number(v.cos_contrast[i], 2)),
    entry("nearest unembedding", v.nearest_token[i] === null ? "–" : visible(JSON.stringify(v.nearest_token[i]))),
  );
  const tokens = v.top_tokens[i] ?? [];
  $("#tokens").replaceChildren(...tokens.map((token, j) =>
    node("span", "token", node("b", "", visible(JSON.stringify(token).slice(1, -1))), number(100 * v.top_probs[i][j], 2) + " %")));
}

// The training prompt first, prompt_10 after prompt_9.
function byName(a, b) {
  return (b === "training") - (a === "training") || a.localeCompare(b, "en", { numeric: true });
}

function textsOf(key) {
  return (state.data.rows.get(key) ?? []).filter((row) => inScale(row));
}

function inScale(row) {
  return state.data.texts.kind[row] === "unsteered" || state.data.texts.scale[row] === $("#scale").value;
}

function showOutputs({ kind, n }) {
  const t = state.data.texts, mine = textsOf(`${kind}/${n}`);
  const beside = $("#beside").value, other = beside ? textsOf(beside) : [];
  const prompts = [...new Set(mine.map((row) => t.prompt_id[row]))].sort(byName);
  const column = (title, rows) => node("div", "", node("h5", "", title), ...rows.map(textNode));
  const cards = prompts.map((prompt) => {
    const of = (rows) => rows.filter((row) => t.prompt_id[row] === prompt);
    const heading = node("h4", "", prompt + " ", node("span", "", visible(state.data.prompts[prompt] ?? "")));
    const pair = node("div", "pair", column(kind === "chain" ? `n = ${n}` : `${kind} ${n}`, of(mine)));
    if (beside) pair.append(column($("#beside").selectedOptions[0].text, of(other)));
    return node("article", "output", heading, pair);
  });
  $("#outputs").replaceChildren(...(cards.length ? cards : [node("p", "missing", "No texts were sampled for this direction at this norm.")]));
}

function textNode(row) {
  const pre = node("pre", "", visible(state.data.texts.text[row]) || "(nothing)");
  pre.dir = "auto";
  return node("div", "text", pre, judged(row));
}

function judged(row, ...before) {
  const t = state.data.texts, line = node("div", "judged", ...before, `sample ${t.sample[row]} · score ${number(t.concept_score[row])}`);
  if (t.detected[row]) line.append(" · ", node("span", "yes", "detected"));
  return line;
}

/* search */

function matches() {
  const t = state.data.texts, words = $("#query").value.toLowerCase();
  const low = parseFloat($("#low").value), high = parseFloat($("#high").value), only = $("#detected").checked;
  if (!words && isNaN(low) && isNaN(high) && !only) return null;
  const rows = [];
  for (let i = 0; i < t.n.length; i++) {
    const score = t.concept_score[i];
    if (only && !t.detected[i]) continue;
    if (!isNaN(low) && !(score !== null && score >= low)) continue;
    if (!isNaN(high) && !(score !== null && score <= high)) continue;
    if (words && !state.data.lower[i].includes(words)) continue;
    rows.push(i);
  }
  if ($("#order").value === "score") rows.sort((a, b) => (t.concept_score[b] ?? -Infinity) - (t.concept_score[a] ?? -Infinity));
  else rows.sort((a, b) => t.n[a] - t.n[b] || a - b);
  return rows;
}

function search() {
  if (!state.data) return;
  const t = state.data.texts, rows = matches(), total = t.n.length;
  const out = state.data.left_out ? ` (${state.data.left_out.toLocaleString("en")} more are in the run but not in this file)` : "";
  $("#count").textContent = rows === null
    ? `${total.toLocaleString("en")} texts${out}. Type a word or set a filter.`
    : `${rows.length.toLocaleString("en")} of ${total.toLocaleString("en")} texts${out}, under ${new Set(rows.map((i) => t.kind[i] + "/" + t.n[i])).size.toLocaleString("en")} directions.`;
  $("#hits").replaceChildren(...(rows ?? []).slice(0, state.shown).map(hit));
  $("#more").hidden = (rows ?? []).length <= state.shown;
}

function hit(row) {
  const t = state.data.texts, text = t.text[row], words = $("#query").value.toLowerCase();
  const at = words ? Math.max(0, state.data.lower[row].indexOf(words)) : 0, from = Math.max(0, at - 80);
  const pre = node("pre", "", (from ? "…" : "") + visible(text.slice(from, at)), node("mark", "", visible(text.slice(at, at + words.length))),
    visible(text.slice(at + words.length, at + 160)) + (text.length > at + 160 ? "…" : ""));
  pre.dir = "auto";
  const kind = t.kind[row], name = ["base", "chain"].includes(kind) ? `n = ${t.n[row]}` : `${kind} ${t.n[row]}`;
  const button = node("button", "hit", judged(row, `${name} · ${t.prompt_id[row]} · `), pre);
  button.addEventListener("click", () => {
    $("#scale").value = t.scale[row];
    go(kind === "base" ? "chain" : kind, t.n[row]);
    $("#explorer").scrollIntoView();
  });
  return node("li", "", button);
}

/* choice of the concept */

function options(select, values, chosen) {
  select.replaceChildren(...values.map(([value, text]) => Object.assign(node("option", "", text), { value })));
  select.value = values.some(([value]) => value === chosen) ? chosen : values[0]?.[0] ?? "";
}

async function choose(concept, kind = "chain", n = 0) {
  state.concept = concept;
  for (const tab of $$("[role=tab]")) tab.setAttribute("aria-selected", tab.dataset.concept === concept);
  for (const section of $$(".concept")) section.hidden = section.dataset.concept !== concept;
  const plots = $$(".plot:not([data-drawn])").filter((element) => element.offsetParent);
  plots.slice(2).forEach((element) => watcher.observe(element));
  await Promise.all(plots.slice(0, 2).map(draw));
  // The first figures are seen before the texts are unpacked.
  await new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
  const data = await load(concept);
  if (state.concept !== concept) return;
  Object.assign(state, { data, kind: data.stops.has(kind) ? kind : [...data.stops.keys()][0], at: 0, shown: PAGE });
  options($("#kind"), [...data.stops.keys()].map((name) => [name, name]), state.kind);
  const scales = [...new Set(data.texts.scale)];
  options($("#scale"), scales.map((name) => [name, name]), "own");
  const random = [...data.rows.keys()].find((key) => key.startsWith("random/")) ?? "random";
  const others = [["unsteered/0", "unsteered"], ["base/0", "base"], ["contrast/0", "mean difference"], [random, random.replace("/", " ")]];
  options($("#beside"), [["", "nothing"], ...others.filter(([key]) => data.rows.has(key))], "unsteered/0");
  go(state.kind, n);
  search();
  document.body.dataset.ready = concept;
}

for (const tab of $$("[role=tab]")) tab.addEventListener("click", () => choose(tab.dataset.concept));
$("#kind").addEventListener("change", (event) => go(event.target.value, 0));
$("#n").addEventListener("change", (event) => go(state.kind, Number(event.target.value)));
$("#slider").addEventListener("input", (event) => { state.at = Number(event.target.value); show(); });
$("#previous").addEventListener("click", () => step(-1));
$("#next").addEventListener("click", () => step(1));
for (const id of ["#scale", "#beside"]) $(id).addEventListener("change", show);
$("#more").addEventListener("click", () => { state.shown += PAGE; search(); });
let waiting;
for (const id of ["#query", "#low", "#high", "#detected", "#order"]) $(id).addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => { state.shown = PAGE; search(); }, 120);
});
document.addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!by || event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, [role=tab]")) return;
  event.preventDefault();
  step(by * (event.shiftKey ? 10 : 1));
});

const [concept, kind, n] = location.hash.slice(1).split("/");
if (CONCEPTS.includes(concept)) choose(concept, kind, Number(n) || 0);
else choose(CONCEPTS[0]);
