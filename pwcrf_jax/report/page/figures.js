// Table, changes, iterations, calibration, classes, confusion.
(function about() {
  const a = DATA.about, parts = [
    `Data set ${a.dataset}, split ${a.split}, ${count(a.images)} images.`,
    `${a.checkpoint === "best" ? "Best" : "Newest"} checkpoint, step ${count(a.step)}.`,
  ];
  const weights = DATA.relations.map((r) => `${r.name} ${r.weight}`).join(", ");
  parts.push(
    DATA.relations.length
      ? !a.iterations
        ? `Relations ${weights}, but no iterations of mean field (config.crf.num_iterations = 0), so they change nothing.`
        : `Mean field: ${a.iterations} iterations, message weights ${weights}, damping ${a.damping}, messages ${a.average_messages ? "averaged" : "summed"} over a cell's neighbours.`
      : "No relations are used, so there is no mean field: the answer is the unary network's.",
  );
  if (a.unary_temperature !== 1) parts.push(`The unary's scores are divided by a temperature of ${a.unary_temperature}.`);
  if (a.tuned_on) parts.push(`Weights were tuned on ${a.tuned_on}.`);
  byId("about").textContent = parts.join(" ");
  const whole = DATA.changes.find((c) => c.from === FIRST && c.to === LAST);
  const share = (n) => percent(n / Math.max(1, whole.pixels)) + " %";
  const verdict = byId("verdict");
  if (STAGES.length < 2) {
    verdict.textContent = "Nothing comes after the unary network in this run: there are no relations and no refinement to look at.";
    return;
  }
  const before = DATA.rows[FIRST].miou, after = DATA.rows[LAST].miou;
  verdict.append(
    `From ${plain(FIRST)} to ${plain(LAST)} ${share(whole.right + whole.wrong + whole.other)} of the pixels change their label: ` +
      `${share(whole.right)} become right, ${share(whole.wrong)} become wrong. `,
    before === null || after === null ? "" : `Mean IoU ${percent(before)} \u2192 ${percent(after)} %.`,
  );
})();

(function summary() {
  const widths = Object.keys(DATA.rows.unary.boundary_iou);
  const scored = DATA.classes.filter((c) => c.scored).length;
  const head = ["", scored < DATA.classes.length ? `mean IoU of ${scored}` : "mean IoU", ...widths.map((w) => `IoU ${w} px`),
    "pixel acc", "mean acc", "fw IoU"];
  const values = (r) => [r.miou, ...widths.map((w) => r.boundary_iou[w]), r.pixel_accuracy, r.mean_accuracy, r.fw_iou];
  const base = values(DATA.rows.unary);
  const rows = Object.entries(DATA.rows).map(([row, r]) =>
    el("tr", { "data-row": row }, rowHead(title(row)),
      values(r).map((x, i) => el("td", {}, el("span", { class: "number", text: percent(x) }),
        row === "unary" || x === null || base[i] === null ? null : delta(100 * (x - base[i]))))));
  byId("summary-table").append(
    el("thead", {}, el("tr", {}, head.map((text) => el("th", { scope: "col", text })))), el("tbody", {}, rows));
  byId("summary-caption").textContent =
    "All figures in percent, with the difference to the unary network alone in points. Each relation by itself is added to the unary; " +
    "\u201call relations\u201d uses them together, and what follows builds on it. \u201cIoU w px\u201d is the mean IoU of the pixels that close to a boundary of the truth." +
    (DATA.relations.length ? "" : " This run has no relations: \u201call relations\u201d is the unary again.") +
    (DATA.about.refine === "off" ? " Boundary refinement was off; add --refine full to see it." : ` Boundary refinement: ${DATA.about.refine}.`) +
    (DATA.about.void ? ` ${count(DATA.about.void)} void pixels count nowhere.` : "");
})();

(function changes() {
  const kinds = [["right", "var(--good)", "became right"], ["wrong", "var(--bad)", "became wrong"], ["other", "var(--other)", "wrong to wrong"]];
  const changed = (c) => c.right + c.wrong + c.other;
  const any = DATA.changes.some(changed);
  const most = any ? Math.max(...DATA.changes.map((c) => changed(c) / Math.max(1, c.pixels))) : 1;
  if (!DATA.changes.length || STAGES.length < 2) {
    byId("changes-caption").textContent = "There is one stage alone, so no label is changed by another.";
    return;
  }
  const share = (n, c) => el("td", { text: percent(n / Math.max(1, c.pixels), 2) + " %", title: count(n) + " pixels" });
  byId("changes-table").append(
    el("thead", {}, el("tr", {}, ["", "net", "", "changed", ...kinds.map((k) => k[2])].map((text) => el("th", { scope: "col", text })))),
    el("tbody", {}, DATA.changes.map((c) =>
      el("tr", { "data-from": c.from, "data-to": c.to },
        rowHead(`${plain(c.from)} \u2192 ${plain(c.to)}`),
        el("td", {}, delta((100 * (c.right - c.wrong)) / Math.max(1, c.pixels), 2)),
        el("td", {}, el("div", { class: "bar", "aria-hidden": "true" }, kinds.map(([kind, colour]) =>
          el("span", { style: `background:${colour};width:${(100 * c[kind]) / Math.max(1, c.pixels) / most}%` })))),
        share(changed(c), c), kinds.map(([kind]) => share(c[kind], c))))));
  byId("changes-caption").textContent =
    `Shares of all ${count(DATA.changes[0].pixels)} pixels with a label. \u201cNet\u201d is what became right less what became wrong, in points of pixel accuracy. ` +
    (any ? `Bars: blue became right, orange wrong, violet went from one wrong class to another; a full bar is ${percent(most, 2)} %.`
      : "No stage changes a label.");
})();

function axes(width, height, pad, x, y) {
  const line = (x1, y1, x2, y2) => svg("line", { x1, y1, x2, y2, stroke: "var(--line)" });
  return [
    ...x.ticks.map(([at, text]) => [line(at, pad.top, at, height - pad.bottom),
      svg("text", { x: at, y: height - pad.bottom + 16, "text-anchor": "middle", text })]),
    ...y.ticks.map(([at, text]) => [line(pad.left, at, width - pad.right, at),
      svg("text", { x: pad.left - 6, y: at + 4, "text-anchor": "end", text })]),
    svg("text", { x: (pad.left + width - pad.right) / 2, y: height - 4, "text-anchor": "middle", text: x.name }),
  ].flat();
}

(function iterations() {
  const node = byId("iterations");
  const rows = Object.keys(DATA.iterations).filter((row) => row !== "unary" && DATA.iterations[row].length &&
    (row === "refined" || DATA.relations.length));
  if (!rows.length) {
    const why = DATA.relations.length ? "config.crf.num_iterations is 0" : "no relation is used";
    const refinement = DATA.about.refine === "off" ? "is off" : "has none either";
    node.append(el("p", { class: "note", text: `There are no iterations: ${why} and refinement ${refinement}.` }));
    return;
  }
  const width = 340, height = 240, pad = { left: 52, right: 12, top: 10, bottom: 40 };
  const longest = Math.max(...rows.map((row) => DATA.iterations[row].length));
  const floor = 1e-6, all = rows.flatMap((row) => DATA.iterations[row]).map((v) => Math.max(floor, v));
  const low = Math.min(-1, Math.floor(Math.log10(Math.min(...all))));
  const x = (i) => pad.left + 12 + ((width - pad.left - pad.right - 24) * i) / Math.max(1, longest - 1);
  const y = (v) => pad.top + ((height - pad.top - pad.bottom) * -Math.log10(Math.max(10 ** low, v))) / -low;
  const every = Math.ceil(longest / 10);
  const ticks = Array.from({ length: longest }, (_, i) => i).filter((i) => i % every === 0).map((i) => [x(i), String(i + 1)]);
  const heights = Array.from({ length: -low + 1 }, (_, i) => [y(10 ** -i), i > 4 ? `1e\u2212${i}` : String(10 ** -i)]);
  const order = [...STAGES, ...rows.filter((row) => !STAGES.includes(row))];
  const chart = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", style: "max-width:400px", "aria-label": "Largest change of a marginal in each iteration; the table below has the numbers" },
    axes(width, height, pad, { ticks, name: "iteration" }, { ticks: heights }),
    rows.map((row) => {
      const points = DATA.iterations[row].map((v, i) => [x(i), y(v)]), stroke = rowColour(row, order);
      return [svg("polyline", { points: points.join(" "), fill: "none", stroke, "stroke-width": 2 }),
        ...points.map(([cx, cy]) => svg("circle", { cx, cy, r: 3.5, fill: stroke }))];
    }).flat());
  const key = el("div", { class: "legend" });
  legend(key, rows.map((row) => [rowColour(row, order), title(row)]));
  const table = el("table", { id: "iterations-table" }, el("tbody", {}, rows.map((row) => el("tr", { "data-row": row },
    rowHead(title(row)), DATA.iterations[row].map((v) => el("td", { text: v.toPrecision(3) }))))));
  node.append(chart, key,
    el("p", { class: "caption", text: "The largest change of any probability, over all cells, classes and images (logarithmic scale). A line that does not fall says that inference has not settled: more damping (config.crf.damping) can help." }),
    el("details", {}, el("summary", { text: "Numbers" }), el("div", { class: "scroll" }, table)));
})();

(function calibration() {
  const node = byId("calibration"), width = 340, height = 320, pad = { left: 44, right: 12, top: 10, bottom: 40 };
  const x = (v) => pad.left + (width - pad.left - pad.right) * v;
  const y = (v) => height - pad.bottom - (height - pad.top - pad.bottom) * v;
  const ticks = [0, 0.2, 0.4, 0.6, 0.8, 1];
  const curves = STAGES.map((row) => {
    const c = DATA.calibration[row], stroke = rowColour(row, STAGES);
    const most = Math.max(...c.number);
    const points = c.confidence.map((v, i) => [v, c.accuracy[i], c.number[i]]).filter((p) => p[2]).map(([a, b, m]) => [x(a), y(b), m]);
    return [svg("polyline", { points: points.map((p) => p.slice(0, 2)).join(" "), fill: "none", stroke, "stroke-width": 1.5 }),
      ...points.map(([cx, cy, m]) => svg("circle", { cx, cy, r: 1.5 + 6 * Math.sqrt(m / most), fill: stroke, "fill-opacity": 0.85 },
        svg("title", { text: `${count(m)} pixels` })))];
  });
  const key = el("div", { class: "legend" });
  legend(key, STAGES.map((row) => [rowColour(row, STAGES), `${title(row)}: ECE ${percent(DATA.calibration[row].ece)} %`]));
  const head = ["", "ECE %", "mean confidence %", "pixel accuracy %"].map((text) => el("th", { scope: "col", text }));
  const table = el("table", { id: "calibration-table" }, el("thead", {}, el("tr", {}, head)), el("tbody", {}, STAGES.map((row) =>
    el("tr", { "data-row": row }, rowHead(title(row)), el("td", { class: "ece", text: percent(DATA.calibration[row].ece, 2) }),
      el("td", { text: percent(DATA.calibration[row].mean_confidence, 2) }), el("td", { text: percent(DATA.rows[row].pixel_accuracy, 2) })))));
  node.append(
    svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", style: "max-width:400px", "aria-label": "Calibration curve; the table below has the errors" },
      axes(width, height, pad, { ticks: ticks.map((v) => [x(v), String(100 * v)]), name: "confidence, %" }, { ticks: ticks.map((v) => [y(v), String(Math.round(100 * v))]) }),
      svg("line", { x1: x(0), y1: y(0), x2: x(1), y2: y(1), stroke: "var(--soft)", "stroke-dasharray": "4 4" }), curves.flat()),
    key,
    el("p", { class: "caption", text: `Of the pixels whose best probability lies in one of ${DATA.about.bins} equal bins, the share that is right (up) against that probability (across). The larger a dot, the more pixels its bin has of all of its stage. On the dashed line confidence is deserved, below it the model is too sure. ECE, the expected calibration error, is the mean distance to the line, weighted by pixels.` }),
    el("details", {}, el("summary", { text: "Numbers" }), el("div", { class: "scroll" }, table)));
})();

(function classes() {
  const rows = Object.keys(DATA.rows).filter((row) => STAGES.includes(row));
  const iou = (row, name) => DATA.rows[row].iou[name];
  const known = (x) => x !== null && x !== undefined;
  const gain = (name) => (known(iou(LAST, name)) && known(iou(FIRST, name)) ? iou(LAST, name) - iou(FIRST, name) : 0);
  legend(byId("classes-legend"), rows.map((row) => [rowColour(row, STAGES), title(row)]));
  function draw() {
    const names = DATA.classes.map((c) => c.name);
    const by = { gain: (a, b) => gain(b) - gain(a), loss: (a, b) => gain(a) - gain(b), iou: (a, b) => (iou(LAST, b) ?? -1) - (iou(LAST, a) ?? -1) };
    const sort = by[byId("classes-sort").value];
    if (sort) names.sort(sort);
    byId("classes-bars").replaceChildren(...names.map((name) => {
      const c = DATA.classes.find((other) => other.name === name);
      return el("div", { class: "class-row", "data-class": name },
        el("div", { class: "name" }, swatch(rgb(c.colour)), " ", c.scored ? name : `(${name})`),
        el("div", { class: "bars" }, rows.map((row) => el("div", { class: "track", title: `${title(row)}: ${percent(iou(row, name))} %` },
          el("div", { style: `width:${100 * (iou(row, name) ?? 0)}%;background:${rowColour(row, STAGES)}` })))),
        el("div", { class: "value" }, rows.map((row, i) => el("div", { "data-row": row }, el("span", { class: "number", text: percent(iou(row, name)) }),
          i && known(iou(row, name)) && known(iou(rows[i - 1], name)) ? delta(100 * (iou(row, name) - iou(rows[i - 1], name))) : null))));
    }));
  }
  byId("classes-sort").addEventListener("change", draw);
  byId("classes-caption").textContent =
    "IoU in percent; a full bar is 100. Beside it, what each stage adds to the one before, in points. \u2013: the class is neither in the truth nor predicted." +
    (DATA.classes.some((c) => !c.scored) ? " Classes in brackets are not part of the means." : "");
  draw();
})();

(function confusion() {
  const select = byId("confusion-stage"), rows = Object.keys(DATA.confusion);
  const sums = Object.fromEntries(rows.map((row) => [row, DATA.confusion[row].map((r) => r.reduce((a, b) => a + b, 0))]));
  const share = (row, i, j) => (sums[row][i] ? DATA.confusion[row][i][j] / sums[row][i] : null);
  select.append(...rows.map((row) => option(row, title(row))),
    ...rows.filter((row) => row !== "unary").map((row) => option("change:" + row, `${plain(row)}, difference to unary`)));
  const change = () => select.value.startsWith("change:");
  const row = () => select.value.replace("change:", "");
  const value = (i, j) => {
    const now = share(row(), i, j);
    return now === null || !change() ? now : now - share("unary", i, j);
  };
  // Colours by the square root, as most entries are small.
  const colour = (v) => (change() ? diverging(Math.sign(v) * Math.sqrt(Math.min(1, Math.abs(v) / 0.25))) : sequential(Math.sqrt(v)));
  const name = (i) => DATA.classes[i].name;
  const map = heatMap(byId("confusion-map"), {
    label: "Confusion matrix", rows: "truth", columns: "predicted", value, colour, hint: "Click a cell to read it.",
    scale: () => [change() ? ramp((t) => colour(t * 0.25), -1, 1, "\u221225 points or less", "+25 or more") : ramp(colour, 0, 1, "0 %", "100 %")],
    text: (i, j) => {
      const v = value(i, j);
      if (v === null) return `No pixel of the truth is ${name(i)}.`;
      const pixels = `${count(DATA.confusion[row()][i][j])} of ${count(sums[row()][i])} pixels`;
      return `${name(i)} in truth, predicted as ${name(j)}: ` + (change() ? `${signed(100 * v, 2)} points (now ${pixels})` : `${percent(v, 2)} % (${pixels})`);
    },
  });
  if (rows.includes(LAST)) select.value = LAST;
  select.addEventListener("change", map.draw);
  map.draw();
})();
