"use strict";
// What is shown of one direction, and the search through all texts.

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
  $$(`#concept-${state.concept} .plot[data-drawn][data-along-n]`).forEach(pointAt);
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
    entry("stopped because", (v.stop_reason[i] ?? "–").replaceAll("_", "_\u200b")),
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
  const t = state.data.texts, line = node("div", "judged", ...before, `${t.temperature[row] ? `sample ${t.sample[row]}` : "greedy"} · score ${number(t.concept_score[row])}`);
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
