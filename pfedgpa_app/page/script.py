"""The page's own script; Flower packs Python files only, so it is a string."""

SCRIPT = r"""
"use strict";
const plots = [...document.querySelectorAll(".plot")];
const figures = new Map(plots.map((p) => [p, JSON.parse(p.nextElementSibling.textContent)]));

function draw(plot) {
  const figure = figures.get(plot);
  const slider = plot.closest(".moved")?.querySelector("input");
  const frame = figure.frames && slider ? figure.frames[Number(slider.value)] : figure;
  const layout = { ...figure.layout, width: plot.clientWidth };
  layout.xaxis = { ...layout.xaxis, ...frame.layout?.xaxis };
  plot.dataset.width = plot.clientWidth;
  Plotly.react(plot, frame.data.map((trace) => ({ ...trace })), layout, { displayModeBar: false });
}

for (const slider of document.querySelectorAll("input[type=range]")) {
  const rounds = JSON.parse(slider.dataset.rounds);
  slider.addEventListener("input", () => {
    const shown = `Round ${rounds[Number(slider.value)]}`;
    slider.setAttribute("aria-valuetext", shown);
    slider.parentElement.querySelector("output").textContent = shown;
    slider.closest(".moved").querySelectorAll(".plot").forEach(draw);
  });
}

function csv(plot) {
  const rows = [["name", "x", "y", "value"]];
  for (const { name = "", x, y, z } of plot.data) {
    for (const [row, value] of Array.from(y).entries()) {
      if (z) z[row].forEach((each, column) => rows.push([name, x[column], value, each]));
      else rows.push([name, x[row], value, ""]);
    }
  }
  // No text is a formula of a spreadsheet.
  const cell = (each) =>
    typeof each === "string"
      ? `"${each.replace(/^[=+@\t\r-]/, "'$&").replace(/"/g, '""')}"`
      : String(each ?? "");
  return rows.map((row) => row.map(cell).join(",") + "\n").join("");
}

for (const button of document.querySelectorAll(".save")) {
  button.addEventListener("click", async () => {
    const plot = button.closest("figure").querySelector(".plot");
    const link = document.createElement("a");
    link.download = `${plot.ariaLabel.replace(/[^A-Za-z0-9]+/g, "-")}.${button.dataset.as}`;
    const size = { width: plot.clientWidth, height: plot.clientHeight };
    link.href =
      button.dataset.as === "csv"
        ? `data:text/csv;charset=utf-8,${encodeURIComponent(csv(plot))}`
        : await Plotly.toImage(plot, { format: "svg", ...size });
    link.click();
  });
}

// What is in a closed section has no width: it is drawn when that opens.
function drawShown() {
  for (const plot of plots) {
    if (plot.checkVisibility() && plot.clientWidth !== Number(plot.dataset.width)) draw(plot);
  }
}

const resized = new ResizeObserver(drawShown);
for (const plot of plots) resized.observe(plot);
for (const section of document.querySelectorAll(".section")) {
  section.addEventListener("toggle", drawShown);
}
drawShown();
"""
