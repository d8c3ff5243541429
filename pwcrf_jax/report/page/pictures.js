// Compatibilities, gallery, inspector.
const reach = (offsets, axis) => {
  const all = offsets.map((o) => o[axis]);
  return [Math.min(...all), Math.max(...all)];
};
// Where a neighbour q lies from its cell p.
function whereWord(offsets) {
  const [top, bottom] = reach(offsets, 0), [left, right] = reach(offsets, 1);
  if (bottom < 0) return "above";
  if (top > 0) return "below";
  if (right < 0) return "left of";
  if (left > 0) return "right of";
  return "near";
}

(function compatibility() {
  const body = byId("compatibility-body");
  if (!DATA.relations.length) {
    body.append(el("p", { class: "note", text: "This model uses no relations, so it has learned no compatibilities of labels." }));
    return;
  }
  const names = DATA.classes.map((c) => c.name), n = names.length;
  const mean = (xs) => xs.reduce((a, b) => a + b, 0) / xs.length;
  for (const r of DATA.relations) {
    const z = r.scores, rows = z.map(mean), cols = names.map((_, j) => mean(z.map((row) => row[j]))), all = mean(rows);
    const views = {
      pair: (i, j) => z[i][j] - rows[i] - cols[j] + all,
      raw: (i, j) => z[i][j] - all,
    };
    const where = whereWord(r.offsets), [rowsFrom, rowsTo] = reach(r.offsets, 0), [colsFrom, colsTo] = reach(r.offsets, 1);
    const select = el("select", { id: `compatibility-${r.name}` }, option("pair", "what the pair says beyond each label"), option("raw", "the mean score as it is"));
    const value = (i, j) => views[select.value](i, j);
    let most = 1;
    const measure = () => (most = Math.max(1e-6, ...z.flatMap((row, i) => row.map((_, j) => Math.abs(value(i, j))))));
    const node = el("div", { class: "map" }), list = el("p", { class: "pairs" });
    const pair = (i, j) => `${names[j]} ${where} ${names[i]}`;
    const pairs = z.flatMap((row, i) => row.map((_, j) => [views.pair(i, j), i, j])).sort((a, b) => b[0] - a[0]);
    const few = (some) => some.map(([v, i, j]) => `${pair(i, j)} (${signed(v, 2)})`).join(", ");
    body.append(el("h3", { text: r.name }), el("p", {}, el("label", { for: select.id, text: "Show" }), " ", select), el("div", { class: "columns" }, node, el("div", {}, list,
      el("p", { class: "caption", text:
        `Row: label of a cell. Column: label of a neighbour in its box, which reaches over rows ${rowsFrom} to ${rowsTo} and columns ${colsFrom} to ${colsTo} from the cell ` +
        `(negative: above, left). Each number is the score z of that pair of labels, as the network gives it${DATA.about.label_weights ? ", times the weights of the two labels" : ""}, in nats: its mean over all ` +
        `${count(r.edges)} pairs of a cell and a neighbour, in all ${count(DATA.about.images)} images of the split, whatever their labels are. ` +
        "A constant added to all pairs changes nothing, so the mean of all is taken off; the first view takes off the means of rows and columns too. Blue: the pair is encouraged, orange: discouraged. " +
        (r.parameterisation === "residual"
          ? "Residual form: in training the unary\u2019s log-probabilities of both cells are added to z; shown is z alone, which is what is sent as messages."
          : "Free form: z is all there is, so it also holds what the network knows of how frequent labels are and how each cell looks.") }))));
    measure();
    const map = heatMap(node, {
      label: `Compatibilities of ${r.name}`, rows: "cell", columns: "neighbour", value, colour: (v) => diverging(v / most), hint: "Click a cell to read it.",
      scale: () => [ramp((t) => diverging(t), -1, 1, fixed(-most, 2), signed(most, 2))],
      text: (i, j) => `${pair(i, j)}: ${signed(value(i, j), 2)} (mean score ${fixed(z[i][j], 2)})`,
    });
    list.textContent = `Most encouraged: ${few(pairs.slice(0, 3))}. Most discouraged: ${few(pairs.slice(-3).reverse())}.`;
    select.addEventListener("change", () => (measure(), map.draw()));
  }
})();

const HAS_CELLS = new Set(DATA.inspector.images.map((image) => image.index));
const CHANGE_TEXT = { right: "became right", wrong: "became wrong", other: "from one wrong class to another" };

(function gallery() {
  const images = DATA.gallery, cards = byId("gallery-cards"), PAGE = 10;
  const gain = (image) => (image.right[LAST] - image.right[FIRST]) / Math.max(1, image.valid);
  const doubt = (image) => Object.values(image.entropy)[0]; // of mean field: refinement leaves little
  const about = byId("gallery-about");
  if (!images.length) {
    about.textContent = "The report was written without a gallery (--report_images=0).";
    for (const id of ["gallery-controls", "gallery-more"]) byId(id).hidden = true;
    return;
  }
  about.textContent = (images.length < DATA.about.images
    ? `${images.length} of ${count(DATA.about.images)} images: those that gained most and those that lost most.`
    : `All ${images.length} images.`) +
    (STAGES.length < 2 ? " Nothing comes after the unary network, so nothing is gained or lost." : ` Gained: points of pixel accuracy from ${plain(FIRST)} to ${plain(LAST)}.`) +
    " Pictures are reduced in size, the figures are of all pixels.";
  const sort = byId("gallery-sort"), filter = byId("gallery-class");
  const found = new Set(images.flatMap((image) => image.classes));
  filter.append(option("", "any"), ...DATA.classes.map((c, i) => [i, c.name]).filter(([i]) => found.has(i)).map(([i, name]) => option(String(i), name)));
  filter.title = "in the truth or in the answer of the last stage";
  legend(byId("gallery-legend"), [...DATA.classes.map((c, i) => [i, rgb(c.colour), c.name]).filter(([i]) => found.has(i)).map((x) => x.slice(1)),
    [rgb(DATA.colours.void), "void"]]);
  byId("gallery-scales").append(el("div", { class: "legend" },
    ...Object.entries(CHANGE_TEXT).map(([kind, text]) => STAGES.length < 2 ? null : el("span", {}, swatch(rgb(DATA.colours.change[kind])), text)),
    el("span", {}, "entropy: sure", el("span", { class: "ramp", style: `background:linear-gradient(90deg,${DATA.colours.entropy.map(rgb)})` }), "unsure")));
  const picture = (source, text, exact) => el("figure", {}, el("img", { src: source, alt: text, loading: "lazy", class: exact ? "exact" : null }), el("figcaption", { text }));
  function card(image) {
    const right = (row) => percent(image.right[row] / Math.max(1, image.valid)) + "\u00a0%";
    const labels = Object.entries(image.labels).map(([row, source]) =>
      picture(source, row === "truth" ? "truth" : `${plain(row)}: ${image.valid ? right(row) : "no label"}`, true));
    return el("article", { class: "card", "data-index": image.index },
      el("div", { class: "controls" },
        el("h3", {}, image.id || `image ${image.index}`, " ", image.valid && STAGES.length > 1 ? delta(100 * gain(image), 2) : null),
        HAS_CELLS.has(image.index) ? el("button", { type: "button", text: "Inspect its cells", onclick: () => inspect(image.index, true) }) : null),
      el("div", { class: "pictures" }, picture(image.image, "image"), labels,
        STAGES.length > 1 ? picture(image.change, `changed, ${plain(FIRST)} \u2192 ${plain(LAST)}`, true) : null,
        Object.entries(image.uncertainty).map(([row, source]) =>
          picture(source, `entropy, ${plain(row)}: mean\u00a0${percent(image.entropy[row])}\u00a0%`))));
  }
  const orders = { gain: (a, b) => gain(b) - gain(a) || a.index - b.index, loss: (a, b) => gain(a) - gain(b) || a.index - b.index,
    entropy: (a, b) => doubt(b) - doubt(a), index: (a, b) => a.index - b.index };
  let shown = PAGE;
  function draw() {
    const chosen = images.filter((image) => !filter.value || image.classes.includes(Number(filter.value))).sort(orders[sort.value]);
    cards.replaceChildren(...chosen.slice(0, shown).map(card));
    byId("gallery-count").textContent = `${Math.min(shown, chosen.length)} of ${chosen.length} shown`;
    byId("gallery-more").hidden = shown >= chosen.length;
  }
  const again = () => ((shown = PAGE), draw());
  sort.addEventListener("change", again);
  filter.addEventListener("change", again);
  byId("gallery-controls").addEventListener("submit", (event) => event.preventDefault());
  byId("gallery-more").addEventListener("click", () => ((shown += PAGE), draw()));
  draw();
})();

// ------------------------------------------------------------------------------------------------ inspector
const ARRAYS = { uint8: Uint8Array, int16: Int16Array, int32: Int32Array };
const unpack = (packed) => {
  const bytes = Uint8Array.from(atob(packed.data), (c) => c.charCodeAt(0));
  return new ARRAYS[packed.type](bytes.buffer);
};
let inspect = () => {};

(function inspector() {
  const body = byId("inspector-body"), images = DATA.inspector.images;
  if (!images.length) {
    body.append(el("p", { class: "note", text: "The report was written without images to inspect (--report_inspect=0 or --report_images=0)." }));
    return;
  }
  const relations = DATA.about.iterations ? DATA.relations : [];
  const K = DATA.classes.length, name = (k) => DATA.classes[k].name, iterations = DATA.about.iterations;
  const entry = (index) => DATA.gallery.find((image) => image.index === index);
  const choose = el("select", { id: "inspect-image" }, images.map((image) => option(String(image.index), entry(image.index).id || `image ${image.index}`)));
  const background = el("select", { id: "inspect-background" }, option("image", "image"),
    Object.keys(entry(images[0].index).labels).map((row) => option(row, row === "truth" ? "truth" : plain(row))));
  const relation = el("select", { id: "inspect-relation" }, relations.map((r) => option(r.name, r.name)));
  const canvas = el("canvas", { id: "inspect-canvas", tabindex: 0, role: "application", "aria-label": "Cells of the image; arrow keys move from cell to cell" });
  const where = el("p", { id: "inspect-cell", role: "status" }), pushes = el("div", { id: "inspect-pushes" });
  const table = el("table", { id: "inspect-table" }), all = el("button", { type: "button", id: "inspect-all" });
  const boxKey = el("div", { class: "legend" });
  const fewer = images.length < DATA.inspector.wanted && images.length < DATA.gallery.length
    ? " There is room for no more: what is shown of each grows with the number of classes." : "";
  body.append(
    el("p", { text: `${images.length} of the images above can be looked into.${fewer} Click a cell, or use the arrow keys${relations.length ? "; it begins at the cell that the messages changed most" : ""}.` }),
    el("div", { class: "controls" },
      el("span", {}, el("label", { for: choose.id, text: "Image" }), choose),
      el("span", {}, el("label", { for: background.id, text: "Behind the grid" }), background),
      relations.length ? el("span", {}, el("label", { for: relation.id, text: "Box of" }), relation) : null),
    el("div", { class: "inspect" },
      el("div", {}, canvas, boxKey, where),
      el("div", {}, pushes, el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Messages to the chosen cell" }, table), el("p", {}, all))),
    el("p", { class: "caption", text: relations.length
      ? `Shown is the last of ${iterations} mean-field updates. \u201cunary\u201d and \u201cafter\u201d are probabilities of the cell in percent, before any message and after the last update. ` +
        "The columns after them are what each relation adds to the score of each label, in nats: its weight times the " + (DATA.about.average_messages ? "mean" : "sum") +
        " of the messages from the cells of its box (the cell as p) and from the cells in whose box it lies (the cell as q). Only differences between labels count." +
        (DATA.about.damping ? ` Damping ${DATA.about.damping} mixes in the log marginals of the iteration before.` : "")
      : "Without relations or iterations a cell receives no messages: shown is the unary alone." }));

  let image, data, at, everything = false;
  const pictureOf = new Image();
  pictureOf.addEventListener("load", () => draw());
  const source = () => (background.value === "image" ? entry(image.index).image : entry(image.index).labels[background.value]);

  inspect = (index, scroll) => {
    image = images.find((other) => other.index === index);
    choose.value = String(index);
    data = { unary: unpack(image.unary), after: unpack(image.after), sent: unpack(image.sent), truth: unpack(image.truth),
      messages: relations.map((r) => unpack(image.messages[r.name])), counts: relations.map((r) => unpack(image.counts[r.name])) };
    let most = -1; // begin at the cell whose probabilities the messages changed most
    for (let cell = 0; cell < image.grid[0] * image.grid[1]; cell++) {
      let change = 0;
      for (let k = cell * K; k < (cell + 1) * K; k++) change += Math.abs(data.after[k] / image.after.scale - data.unary[k] / image.unary.scale);
      if (change > most) [most, at] = [change, [Math.floor(cell / image.grid[1]), cell % image.grid[1]]];
    }
    pictureOf.src = source();
    show();
    if (scroll) {
      byId("inspector").scrollIntoView();
      canvas.focus({ preventScroll: true });
    }
  };

  // The frame is cut into the cells of the grid; the image fills the frame from the top left.
  const cellSize = () => [DATA.about.frame[0] / DATA.about.grid[0], DATA.about.frame[1] / DATA.about.grid[1]];
  const current = () => relations.find((r) => r.name === relation.value);
  const neighbours = (r, sign) => r.offsets.map(([dr, dc]) => [at[0] + sign * dr, at[1] + sign * dc])
    .filter(([i, j]) => i >= 0 && j >= 0 && i < image.grid[0] && j < image.grid[1]);

  function draw() {
    if (!pictureOf.naturalWidth) return;
    const [height, width] = entry(image.index).size, dense = Math.max(1, Math.round(960 / width));
    Object.assign(canvas, { width: width * dense, height: height * dense });
    const context = canvas.getContext("2d"), [ch, cw] = cellSize().map((x) => x * dense);
    context.imageSmoothingEnabled = background.value === "image";
    context.drawImage(pictureOf, 0, 0, canvas.width, canvas.height);
    const box = ([i, j]) => [j * cw, i * ch, Math.min(cw, canvas.width - j * cw), Math.min(ch, canvas.height - i * ch)];
    context.strokeStyle = "rgba(255,255,255,0.15)";
    context.lineWidth = 1;
    for (let i = 0; i < image.grid[0]; i++) for (let j = 0; j < image.grid[1]; j++) context.strokeRect(...box([i, j]));
    const r = current();
    const outline = (cells, colour, inset) => {
      context.strokeStyle = colour;
      context.lineWidth = Math.max(2, cw / 9);
      for (const cell of cells) {
        const [x, y, w, h] = box(cell);
        context.strokeRect(x + inset, y + inset, w - 2 * inset, h - 2 * inset);
      }
    };
    if (r) {
      outline(neighbours(r, -1), "#ffd166", cw * 0.3);
      outline(neighbours(r, 1), "#4cc9f0", cw * 0.12);
    }
    outline([at], "#000", 0);
    outline([at], "#ff3b6b", cw * 0.06);
  }

  function show() {
    const cell = at[0] * image.grid[1] + at[1], base = cell * K;
    const scores = relations.map((r, n) => ({ r, number: data.counts[n][cell], values: Array.from({ length: K }, (_, k) => data.messages[n][base + k] / image.messages[r.name].scale) }));
    const truth = data.truth[cell];
    where.textContent = `Row ${at[0]}, column ${at[1]} of ${image.grid[0]} x ${image.grid[1]}; truth: ${truth < K ? name(truth) : "void"}.`;
    legend(boxKey, current() ? [["#4cc9f0", "its box (it is p)"], ["#ffd166", "those in whose box it lies (it is q)"]] : []);
    pushes.replaceChildren(...scores.map(({ r, number, values }) => {
      const mean = values.reduce((a, b) => a + b, 0) / K;
      const order = values.map((v, k) => [v - mean, k]).sort((a, b) => b[0] - a[0]);
      const seen = {};
      for (const [i, j] of [...neighbours(r, 1), ...neighbours(r, -1)]) {
        const k = data.sent[i * image.grid[1] + j];
        seen[k] = (seen[k] || 0) + 1;
      }
      const labels = Object.entries(seen).sort((a, b) => b[1] - a[1]).slice(0, 3).map(([k, m]) => `${name(k)} ${m}`).join(", ");
      const flat = order[0][0] - order[K - 1][0] < 0.005;
      return el("p", { "data-relation": r.name }, el("strong", { text: r.name }), ` (${number} messages; labels it hears from: ${labels || "none"}) `,
        flat ? "pushes nowhere." : `pushes towards ${name(order[0][1])} (${signed(order[0][0], 2)}) and away from ${name(order[K - 1][1])} (${signed(order[K - 1][0], 2)}), against the mean of all labels.`);
    }));
    const order = Array.from({ length: K }, (_, k) => k).sort((a, b) => data.after[base + b] - data.after[base + a] || data.unary[base + b] - data.unary[base + a] || a - b);
    const some = everything || K <= 12 ? order : order.slice(0, 10);
    const probability = (array, packed, k) => fixed((100 * array[base + k]) / packed.scale, 1);
    table.replaceChildren(
      el("thead", {}, el("tr", {}, ["label", "unary %", "after %", ...relations.map((r) => r.name)].map((text) => el("th", { scope: "col", text })))),
      el("tbody", {}, some.map((k) => el("tr", { "data-class": k },
        rowHead(swatch(rgb(DATA.classes[k].colour)), " ", name(k)),
        el("td", { "data-column": "unary", text: probability(data.unary, image.unary, k) }),
        el("td", { "data-column": "after", text: probability(data.after, image.after, k) }),
        scores.map(({ r, values }) => el("td", { "data-column": r.name, text: signed(values[k], 2) }))))));
    all.hidden = K <= 12;
    all.textContent = everything ? "Show the likeliest labels" : `Show all ${K} labels`;
    draw();
  }
  const move = (i, j) => {
    at = [Math.min(image.grid[0] - 1, Math.max(0, i)), Math.min(image.grid[1] - 1, Math.max(0, j))];
    show();
  };
  canvas.addEventListener("click", (event) => {
    const scale = entry(image.index).size[1] / canvas.clientWidth, [ch, cw] = cellSize();
    move(Math.floor((event.offsetY * scale) / ch), Math.floor((event.offsetX * scale) / cw));
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    move(at[0] + step[0], at[1] + step[1]);
  });
  choose.addEventListener("change", () => inspect(Number(choose.value)));
  background.addEventListener("change", () => (pictureOf.src = source()));
  relation.addEventListener("change", show);
  all.addEventListener("click", () => ((everything = !everything), show()));
  inspect(images[0].index);
})();

// What is wider than its place fades where it goes on.
(function edges() {
  const look = (node) => node.classList.toggle("more", node.scrollWidth - node.clientWidth - node.scrollLeft > 1);
  const sizes = new ResizeObserver((entries) => entries.forEach(({ target }) => look(target.closest(".scroll"))));
  for (const node of document.querySelectorAll(".scroll")) {
    node.addEventListener("scroll", () => look(node), { passive: true });
    sizes.observe(node);
    sizes.observe(node.firstElementChild);
  }
})();
