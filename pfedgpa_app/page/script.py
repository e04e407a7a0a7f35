"""The page's own script; Flower packs Python files only, so it is a string."""

SCRIPT = r"""
"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 640px)");

function merged(into, from) {
  for (const [key, value] of Object.entries(from)) {
    const isPlain = value !== null && typeof value === "object" && !Array.isArray(value);
    into[key] = isPlain ? merged({ ...(into[key] || {}) }, value) : value;
  }
  return into;
}

// Names at the ends of curves take room, and have places for one range of the axis. A legend has
// theirs where there is room.
function withLegend(layout) {
  if (!layout.annotations || layout.showlegend !== false) return;
  Object.assign(layout, { annotations: [], showlegend: true });
  if (narrow.matches) layout.margin = { ...layout.margin, r: 24 };
  else layout.legend = { orientation: "v", x: 1.02, xanchor: "left", y: 1, yanchor: "top" };
}

// Colours and sizes depend on the screen, which the figures know nothing of.
function dressed(figure, frame) {
  const css = getComputedStyle(document.body);
  const of = (name) => css.getPropertyValue(name).trim();
  const [text, quiet, line] = [of("--text"), of("--quiet"), of("--line")];
  const layout = merged(merged({}, figure.layout), frame ? frame.layout || {} : {});
  Object.assign(layout, { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)" });
  layout.font = { family: css.fontFamily, size: 13, color: text };
  layout.hoverlabel = { bgcolor: of("--soft"), bordercolor: line, font: { color: text } };
  for (const name of Object.keys(layout)) {
    if (/^[xy]axis\d*$/.test(name)) {
      layout[name] = merged({ gridcolor: line, linecolor: line, zeroline: false }, layout[name]);
    }
  }
  for (const shape of layout.shapes || []) shape.line = { ...shape.line, color: quiet };
  if (narrow.matches) {
    withLegend(layout);
    layout.margin = { ...layout.margin, l: 48, r: 12 };
  }
  const scale = [[0, of("--low")], [0.5, of("--middle")], [1, of("--high")]];
  const data = (frame || figure).data.map((trace) =>
    trace.type === "heatmap"
      ? merged({ ...trace }, { colorscale: scale, colorbar: { outlinewidth: 0 } })
      : { ...trace }
  );
  return [data, layout];
}

function draw(plot) {
  const figure = figures[plot.dataset.figure];
  const slider = plot.closest(".moved")?.querySelector("input");
  const frame = figure.frames && slider ? figure.frames[Number(slider.value)] : null;
  const [data, layout] = dressed(figure, frame);
  if (plot.dataset.all === "true") {
    layout.yaxis = { ...layout.yaxis, range: [0, 1.02] };
    withLegend(layout);
  }
  plot.dataset.width = layout.width = plot.clientWidth;
  Plotly.react(plot, data, layout, { displayModeBar: false });
}

// What is hidden has no width: it is drawn when it is shown.
function drawShown(within) {
  for (const plot of within.querySelectorAll(".plot")) {
    if (plot.offsetParent !== null) draw(plot);
  }
}

function choose(tab) {
  for (const other of tab.parentElement.children) {
    const isIt = other === tab;
    other.setAttribute("aria-selected", String(isIt));
    other.tabIndex = isIt ? 0 : -1;
    const panel = document.getElementById(other.getAttribute("aria-controls"));
    panel.hidden = !isIt;
    if (isIt) drawShown(panel);
  }
}

for (const tab of document.querySelectorAll("[role=tab]")) {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    if (!(event.key in steps)) return;
    event.preventDefault();
    const tabs = [...tab.parentElement.children];
    const next = tabs[(tabs.indexOf(tab) + steps[event.key] + tabs.length) % tabs.length];
    next.focus();
    choose(next);
  });
}

for (const slider of document.querySelectorAll("input[type=range]")) {
  const rounds = JSON.parse(slider.dataset.rounds);
  slider.addEventListener("input", () => {
    const shown = `Round ${rounds[Number(slider.value)]}`;
    slider.setAttribute("aria-valuetext", shown);
    slider.parentElement.querySelector("output").textContent = shown;
    for (const plot of slider.closest(".moved").querySelectorAll(".plot")) {
      if (figures[plot.dataset.figure].frames && plot.offsetParent !== null) draw(plot);
    }
  });
}

for (const button of document.querySelectorAll(".zoom")) {
  button.addEventListener("click", () => {
    const plot = button.closest("figure").querySelector(".plot");
    const isAll = plot.dataset.all !== "true";
    plot.dataset.all = String(isAll);
    button.setAttribute("aria-pressed", String(isAll));
    draw(plot);
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
    if (button.dataset.as === "csv") {
      link.href = `data:text/csv;charset=utf-8,${encodeURIComponent(csv(plot))}`;
    } else {
      const ground = getComputedStyle(document.body).backgroundColor;
      const shown = { data: plot.data, layout: { ...plot.layout, paper_bgcolor: ground } };
      const size = { width: plot.clientWidth, height: plot.clientHeight };
      link.href = await Plotly.toImage(shown, { format: "svg", ...size });
    }
    link.click();
  });
}

const resized = new ResizeObserver((seen) => {
  for (const { target } of seen) {
    if (target.clientWidth && target.clientWidth !== Number(target.dataset.width)) draw(target);
  }
});
for (const plot of document.querySelectorAll(".plot")) resized.observe(plot);
for (const query of [dark, narrow]) query.addEventListener("change", () => drawShown(document));
drawShown(document);
"""
