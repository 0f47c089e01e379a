"use strict";
// The choice of the concept, and what answers to clicks and keys.

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
