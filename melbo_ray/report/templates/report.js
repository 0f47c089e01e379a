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

// Without a mouse Plotly shows its buttons always, over the legend.
const CONFIG = {
  responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"],
  displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
};

function figureOf(element) {
  const name = element.dataset.plot;
  return name === "comparison" ? FIGURES.comparison : FIGURES.concepts[element.closest(".concept").dataset.concept][name];
}

async function draw(element) {
  const figure = figureOf(element);
  await Plotly.react(element, figure.data, themed(figure.layout), CONFIG);
  if (element.dataset.drawn) return;
  element.dataset.drawn = "yes";
  if ("alongN" in element.dataset) {
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
  let lower;
  return {
    vectors, texts, prompts, left_out, stops, rows,
    // When somebody searches: nobody has to wait for it when the page opens.
    get lower() { return lower ??= texts.text.map((text) => text.toLowerCase()); },
  };
}
