"use strict";
// What all sections share: the data, elements, numbers, colours and the heat map.
const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = document.getElementById("svg").namespaceURI;
const byId = (id) => document.getElementById(id);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "text") node.textContent = value;
    else if (name === "style") node.style.cssText = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

const fixed = (x, digits) => {
  const text = x.toFixed(digits);
  return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "\u2212");
};
const percent = (x, digits = 1) => (x === null || x === undefined ? "\u2013" : fixed(100 * x, digits));
const signed = (x, digits) => (Number(x.toFixed(digits)) > 0 ? "+" : "") + fixed(x, digits);
const count = (n) => n.toLocaleString("en-US");
const delta = (x, digits = 1) => {
  const shown = Number(x.toFixed(digits));
  return el("span", { class: "delta " + (shown > 0 ? "up" : shown < 0 ? "down" : ""), text: signed(x, digits) });
};

const title = (row) => DATA.titles[row]; // in tables
const plain = (row) => title(row).replace(/^\+ /, ""); // in sentences
const STAGES = DATA.stages;
const FIRST = STAGES[0], LAST = STAGES[STAGES.length - 1];
const rgb = (c) => `rgb(${c[0]},${c[1]},${c[2]})`;
const themed = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const rowColour = (row, rows) => `var(--stage${Math.max(0, rows.indexOf(row)) % 5})`;
const swatch = (colour) => el("span", { class: "swatch", style: `background:${colour}` });
const legend = (node, entries) =>
  node.replaceChildren(...entries.map(([colour, text]) => el("span", {}, swatch(colour), text)));
// The name of a table's row; the style keeps it in sight and breaks long names.
const rowHead = (...children) => el("th", { scope: "row" }, el("span", {}, ...children));
const option = (value, text) => el("option", { value, text });
const redraws = []; // what is drawn on a canvas does not follow the theme by itself
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraws.forEach((draw) => draw()));

const mix = (a, b, t) => a.map((x, i) => Math.round(x + (b[i] - x) * t));
const isDark = () => matchMedia("(prefers-color-scheme: dark)").matches;
const sequential = (t) => mix(isDark() ? [30, 36, 42] : [250, 250, 248], isDark() ? [119, 176, 238] : [22, 78, 140], t);
const diverging = (t) => {
  const middle = isDark() ? [34, 40, 46] : [248, 248, 246];
  return t < 0 ? mix(middle, isDark() ? [240, 139, 85] : [180, 60, 10], -t) : mix(middle, isDark() ? [106, 169, 234] : [30, 90, 165], t);
};
const ramp = (colour, from, to, low, high) => {
  const stops = Array.from({ length: 9 }, (_, i) => rgb(colour(from + ((to - from) * i) / 8)));
  return el("span", {}, low, el("span", { class: "ramp", style: `background:linear-gradient(90deg,${stops})` }), high);
};

// A K x K map. options: label; rows, columns: names of the axes; value(i, j) -> a number for colour(), or null; text(i, j) for the line below.
function heatMap(node, options) {
  const names = DATA.classes.map((c) => c.name), n = names.length;
  const roomy = n <= 14 ? 30 : n <= 25 ? 22 : n <= 60 ? 12 : 7, labelled = roomy >= 11;
  let size = roomy;
  const canvas = el("canvas", { tabindex: 0, role: "img", "aria-label": `${options.label}; arrow keys move from cell to cell` });
  const readout = el("p", { class: "readout", role: "status" });
  const scale = el("div", { class: "legend" });
  const AXIS = 18; // pixels for the name of an axis
  let at = null, margin = 0;
  const context = canvas.getContext("2d");
  const shorten = (name) => (name.length > 16 ? name.slice(0, 15) + "\u2026" : name);
  function draw() {
    const dense = devicePixelRatio || 1;
    context.font = "12px system-ui, sans-serif";
    margin = AXIS + (labelled ? Math.ceil(Math.max(...names.map((x) => context.measureText(shorten(x)).width))) + 8 : 4);
    size = Math.min(roomy, Math.max(Math.min(roomy, 13), Math.floor((node.clientWidth - margin - 4) / n)));
    const span = Math.max(n * size, 80), side = margin + span + 2; // room for the name of an axis
    Object.assign(canvas, { width: side * dense, height: side * dense });
    canvas.style.cssText = `width:${side}px;height:${side}px`;
    context.setTransform(dense, 0, 0, dense, 0, 0);
    context.font = "12px system-ui, sans-serif";
    context.textBaseline = "middle";
    context.fillStyle = themed("--ink");
    for (let i = 0; labelled && i < n; i++) {
      context.textAlign = "right";
      context.fillText(shorten(names[i]), margin - 6, margin + (i + 0.5) * size);
      context.save();
      context.translate(margin + (i + 0.5) * size, margin - 6);
      context.rotate(-Math.PI / 2);
      context.textAlign = "left";
      context.fillText(shorten(names[i]), 0, 0);
      context.restore();
    }
    context.fillStyle = themed("--soft");
    context.textAlign = "center";
    context.fillText(options.columns, margin + span / 2, AXIS / 2);
    context.save();
    context.translate(AXIS / 2, margin + span / 2);
    context.rotate(-Math.PI / 2);
    context.fillText(options.rows, 0, 0);
    context.restore();
    const gap = size > 8 ? 1 : 0;
    for (let i = 0; i < n; i++)
      for (let j = 0; j < n; j++) {
        const value = options.value(i, j);
        context.fillStyle = value === null ? themed("--faint") : rgb(options.colour(value));
        context.fillRect(margin + j * size, margin + i * size, size - gap, size - gap);
      }
    if (at) {
      context.strokeStyle = themed("--bad");
      context.lineWidth = 2;
      context.strokeRect(margin + at[1] * size, margin + at[0] * size, size - gap, size - gap);
    }
    scale.replaceChildren(...options.scale());
    readout.textContent = at ? options.text(...at) : options.hint || "";
  }
  const move = (i, j) => {
    at = [Math.min(n - 1, Math.max(0, i)), Math.min(n - 1, Math.max(0, j))];
    draw();
  };
  canvas.addEventListener("click", (event) => {
    const cell = [event.offsetY, event.offsetX].map((x) => Math.floor((x - margin) / size));
    if (cell.every((x) => x >= 0 && x < n)) move(...cell);
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    if (at) move(at[0] + step[0], at[1] + step[1]);
    else move(0, 0);
  });
  node.classList.add("heat");
  node.replaceChildren(scale, el("div", { class: "scroll" }, canvas), readout);
  redraws.push(draw);
  addEventListener("resize", draw);
  draw();
  return { draw, move };
}
