// Pieces of the page: elements, tables, figures, colours of both schemes, and the start.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const main = document.getElementById("content");
const figures = [];  // {node, traces, layout}: functions of the colours, drawn again when those change

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick" || name === "onchange") node[name] = value;
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  for (const child of children.flat()) if (child != null) node.append(child);
  return node;
}

const format = {
  count: (n) => n == null ? "–" : Math.round(n).toLocaleString("en"),
  fixed: (digits) => (n) => n == null ? "–" : n.toFixed(digits),
  percent: (n) => n == null ? "–" : (100 * n).toFixed(1) + " %",
};

// columns: [title, how to show a value or a node, optional "text" for what is no number]
function table(caption, columns, rows) {
  const head = columns.map(([title, , kind]) => el("th", {scope: "col", class: kind === "text" ? null : "number"}, title));
  const cell = (value, [, show, kind], first) => {
    const content = value instanceof Node || Array.isArray(value) ? value : show ? show(value) : String(value);
    const attributes = {class: kind === "text" ? null : "number"};
    return el(first ? "th" : "td", first ? {...attributes, scope: "row"} : attributes, content);
  };
  const body = rows.map((row) => el("tr", {}, row.map((value, i) => cell(value, columns[i], i === 0))));
  return el("div", {class: "scroll", tabindex: "0", role: "region", "aria-label": caption},
            el("table", {}, el("caption", {}, caption), el("thead", {}, el("tr", {}, head)), el("tbody", {}, body)));
}

function section(id, title, ...children) {
  const node = el("section", {id, "aria-labelledby": id + "-title"}, el("h2", {id: id + "-title"}, title), ...children);
  main.append(node);
  document.getElementById("sections").append(el("li", {}, el("a", {href: "#" + id}, title)));
  return node;
}

const note = (text) => el("p", {class: "note"}, text);

const palette = ["#0b62c4", "#b4540a", "#1a7f4b", "#8a3ffc", "#b3266b", "#00758f", "#6b5b00", "#5a6270"];
const darkPalette = ["#6cb2ff", "#f0a35e", "#5fd39a", "#c4a1ff", "#ff8fc0", "#57d0e6", "#d9c34a", "#b5bdc8"];
const dashes = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
const symbols = ["circle", "square", "diamond", "triangle-up", "cross", "x"];

let dark = false;
function colours() {
  const css = getComputedStyle(document.documentElement);
  const of = (name) => css.getPropertyValue("--" + name).trim();
  return {ink: of("ink"), soft: of("soft"), line: of("line"), card: of("card"), dense: of("dense"), moe: of("moe"),
          series: dark ? darkPalette : palette, scale: dark ? "Viridis" : "Cividis"};
}

function axis(c, title, more = {}) {
  return {title: {text: title, standoff: 8}, gridcolor: c.line, zerolinecolor: c.line, linecolor: c.line, automargin: true, ...more};
}

function layoutOf(c, x, y, more = {}) {
  return {paper_bgcolor: c.card, plot_bgcolor: c.card, font: {color: c.ink, size: 12, family: "system-ui, DejaVu Sans, sans-serif"},
          margin: {l: 56, r: 16, t: 12, b: 44}, xaxis: x, yaxis: y, hovermode: "closest",
          legend: {orientation: "h", yanchor: "bottom", y: 1.02, x: 0, font: {color: c.ink}}, ...more};
}

// A line of `series` number i: told apart by colour, dash and mark.
function line(c, i, name, x, y, more = {}) {
  return {type: "scatter", mode: x.length > 40 ? "lines" : "lines+markers", name, x, y,
          line: {color: c.series[i % c.series.length], dash: dashes[i % dashes.length], width: 2},
          marker: {symbol: symbols[i % symbols.length], size: 7, color: c.series[i % c.series.length]}, ...more};
}

const drawing = [];
function draw(figure) {
  const c = colours();
  const done = Plotly.react(figure.node, figure.traces(c), figure.layout(c), {displayModeBar: false, responsive: true});
  drawing.push(done);
  return done;
}

// A chart with its words and its numbers. `numbers` is a node that holds them as a table.
function chart({title, words, traces, layout, numbers, tools}) {
  const node = el("div", {class: "chart", role: "img", "aria-label": title + ". " + words});
  const figure = {node, traces, layout};
  figures.push(figure);
  const parts = [el("figcaption", {}, el("h3", {}, title), el("span", {class: "note"}, words)), tools, node];
  if (numbers) parts.push(el("details", {}, el("summary", {}, "The numbers of this chart"), numbers));
  return {figure, element: el("figure", {}, parts)};
}

function radios(legend, name, choices, onchange) {
  const inputs = choices.map(([value, text], i) => el("label", {}, el("input", {
    type: "radio", name, value, checked: i === 0 ? "checked" : null, onchange: () => onchange(value)}), " " + text));
  return el("fieldset", {}, el("legend", {}, legend), inputs);
}

function setScheme(toDark) {
  dark = toDark;
  document.documentElement.dataset.scheme = dark ? "dark" : "light";
  const button = document.getElementById("scheme");
  button.setAttribute("aria-pressed", String(dark));
  button.textContent = dark ? "Light" : "Dark";
  for (const figure of figures) draw(figure);
}

// Nested options as rows of one table.
function optionRows(object, prefix = "") {
  return Object.entries(object).flatMap(([key, value]) =>
    value !== null && typeof value === "object" && !Array.isArray(value) ? optionRows(value, prefix + key + ".")
      : [[prefix + key, Array.isArray(value) ? value.join(", ") || "–" : String(value)]]);
}

const optionTable = (caption, object) => table(caption, [["option", null, "text"], ["value", null, "text"]], optionRows(object));

function start() {
  document.getElementById("subtitle").textContent = data.subtitle || "";
  const prefers = window.matchMedia("(prefers-color-scheme: dark)");
  dark = prefers.matches;
  document.documentElement.dataset.scheme = dark ? "dark" : "light";
  document.documentElement.classList.toggle("picture", location.hash === "#picture");
  if (data.results) compareSections();
  if (data.layer) layerSections();
  if (data.options) exampleSections();
  setScheme(dark);
  prefers.addEventListener("change", (event) => setScheme(event.matches));
  document.getElementById("scheme").onclick = () => setScheme(!dark);
  document.getElementById("print").onclick = () => window.print();
  let before = false;
  window.addEventListener("beforeprint", () => {
    before = dark;
    setScheme(false);
    for (const details of document.querySelectorAll("details.always")) details.open = true;
  });
  window.addEventListener("afterprint", () => setScheme(before));
  Promise.all(drawing).then(() => { document.documentElement.dataset.ready = "true"; });
}
