"use strict";
// The figures of a sweep, in the colours of the page.
const FIGURES = JSON.parse(document.querySelector("#figures").textContent);

function draw() {
  const css = getComputedStyle(document.documentElement);
  const colour = (name) => css.getPropertyValue(name).trim();
  document.querySelectorAll(".plot").forEach((element, i) => {
    const { data, layout } = FIGURES[i];
    const axis = (own) => ({ ...own, gridcolor: colour("--grid"), linecolor: colour("--line") });
    const themed = { ...layout, autosize: true, xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis), font: { color: colour("--quiet") } };
    Plotly.react(element, data, themed, { responsive: true, displaylogo: false });
  });
}

draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
