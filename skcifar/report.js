"use strict";
// Text reaches the page by textContent only, never as markup.
(() => {
  const SVG_NAMES = new Set(["svg", "g", "path", "line", "text", "circle"]);
  const VIRIDIS = [
    [68, 1, 84], [72, 36, 117], [65, 68, 135], [53, 95, 141], [42, 120, 142], [33, 145, 140],
    [34, 168, 132], [68, 191, 112], [122, 209, 81], [189, 223, 38], [253, 231, 37],
  ];
  const PARTS = { train: "— training", valid: "┄ validation", "": "value" };
  const MISSING = "–";
  const FAN = 22; // pixels

  for (const table of document.querySelectorAll("table.sortable")) sortable(table);
  const charts = { curves, confusion, heatMap, parallel };
  for (const figure of document.querySelectorAll("[data-chart]")) {
    const data = JSON.parse(figure.querySelector("script").textContent);
    charts[figure.dataset.chart](figure, data);
  }
  for (const gallery of document.querySelectorAll(".gallery")) chooseModel(gallery);
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
  });

  // -- tables -------------------------------------------------------------------------------------

  function sortable(table) {
    const headers = [...table.tHead.rows[0].cells];
    headers.forEach((header, column) => {
      header.querySelector("button").addEventListener("click", () => {
        const down = header.getAttribute("aria-sort") === "ascending";
        for (const each of headers) each.removeAttribute("aria-sort");
        header.setAttribute("aria-sort", down ? "descending" : "ascending");
        const numeric = header.classList.contains("number");
        const body = table.tBodies[0];
        const rows = [...body.rows].map((row) => [row.cells[column].dataset.key, row]);
        rows.sort(([a], [b]) => compareKeys(a, b, numeric, down));
        body.append(...rows.map(([, row]) => row));
      });
    });
  }

  // What is missing comes last, whichever way the rest is sorted.
  function compareKeys(a, b, numeric, down) {
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
    const order = numeric ? a - b : a.localeCompare(b, "en", { numeric: true });
    return down ? -order : order;
  }

  // -- learning curves ----------------------------------------------------------------------------

  function curves(figure, data) {
    const hidden = new Set();
    let quantity = data.quantities[0];
    let cursor = null; // place of the epoch pointed at
    const choice = select("Quantity", data.quantities.map((each) => words(each.name)), (index) => {
      quantity = data.quantities[index];
      logarithmic.checked = spansDecades(quantity);
      draw();
    });
    const logarithmic = make("input", { type: "checkbox" });
    logarithmic.checked = spansDecades(quantity);
    logarithmic.addEventListener("change", () => draw());
    const controls = make("div", { class: "choose" }, choice,
      make("label", {}, logarithmic, "logarithmic"));
    // One element for all drawings, so that it keeps the focus.
    const svg = make("svg", { width: 0, height: 0, tabindex: 0, role: "application" });
    const plot = make("div", { class: "plot" }, svg);
    const values = make("div", { class: "scroll", tabindex: 0, role: "region",
      "aria-label": "Values of the curves" });
    const told = make("p", { class: "unseen", role: "status" }); // to those who hear the page
    figure.append(controls, make("div", { class: "curves" }, plot, values), told);
    let readout = () => {};
    let mark = () => {};
    let x;
    const moveTo = (place) => {
      cursor = Math.min(data.epochs.length - 1, Math.max(0, place));
      mark();
      readout();
    };
    const follow = (event) => {
      const left = svg.getBoundingClientRect().left;
      moveTo(nearest(data.epochs, x.inverse(event.clientX - left)));
    };
    svg.addEventListener("pointermove", follow);
    svg.addEventListener("pointerdown", follow);
    steps(svg, (step) => moveTo(cursor === null ? data.epochs.length - 1 : cursor + step));
    const redraw = onWidth(plot, (width) => drawPlot(width));

    function draw() {
      readout = tabulate();
      redraw();
      readout();
    }

    function tabulate() {
      const parts = ["valid", "train", ""].filter((part) =>
        quantity.curves.some((curve) => curve.part === part));
      const caption = make("caption");
      const head = make("tr", {}, make("td"), ...parts.map((part) =>
        make("th", { scope: "col", class: "number" }, PARTS[part])));
      const table = make("table", { class: "values" }, caption, make("thead", {}, head));
      const body = make("tbody");
      const cells = [];
      data.labels.forEach((label, index) => {
        const toggle = make("button", { type: "button", class: "toggle swatched",
          "aria-pressed": String(!hidden.has(index)) }, label);
        colour(toggle, index, data.labels.length);
        toggle.addEventListener("click", () => {
          hidden.has(index) ? hidden.delete(index) : hidden.add(index);
          toggle.setAttribute("aria-pressed", String(!hidden.has(index)));
          redraw();
        });
        const row = make("tr", {}, make("th", { scope: "row" }, toggle));
        for (const part of parts) {
          const curve = quantity.curves.find((c) => c.label === index && c.part === part);
          const cell = make("td", { class: "number" });
          cells.push([cell, curve, `${label} ${PARTS[part].split(" ").at(-1)}`]);
          row.append(cell);
        }
        body.append(row);
      });
      table.append(body);
      values.replaceChildren(table);
      return () => {
        caption.textContent = cursor === null ? "Last epoch of each" : `Epoch ${data.epochs[cursor]}`;
        const heard = [];
        for (const [cell, curve, name] of cells) {
          const last = () => curve.mean.findLast((value) => value !== null);
          cell.textContent = curve ? aligned(cursor === null ? last() : curve.mean[cursor]) : MISSING;
          if (curve && !hidden.has(curve.label)) heard.push(`${name} ${cell.textContent}`);
        }
        told.textContent = cursor === null ? "" : `${caption.textContent}: ${heard.join("; ")}`;
      };
    }

    function drawPlot(width) {
      const height = Math.round(Math.min(400, Math.max(260, width * 0.5)));
      const box = { left: 52, right: width - 12, top: 10, bottom: height - 38 };
      const shown = quantity.curves.filter((curve) => !hidden.has(curve.label));
      x = scale(data.epochs[0], data.epochs.at(-1), box.left, box.right);
      const numbers = shown.flatMap((c) => [...c.mean, ...(c.low ?? []), ...(c.high ?? [])]);
      const y = valueScale(numbers, box, logarithmic.checked);
      svg.replaceChildren();
      set(svg, { width, height,
        "aria-label": `${words(quantity.name)} at each epoch; arrow keys move the epoch` });
      drawAxes(svg, box, x, y, words(quantity.name));
      const many = shown.length > 8;
      for (const curve of shown) {
        if (curve.low && !many) svg.append(painted(band(curve, x, y), curve));
      }
      for (const curve of shown) {
        const points = curve.mean.map((v, i) => [x(data.epochs[i]), y(v)]);
        svg.append(painted(make("path", { class: `series swatched ${curve.part}`, d: path(points) }), curve));
        for (const [cx, cy] of lone(points)) {
          svg.append(painted(make("circle", { class: "lone swatched", cx, cy, r: 2.6 }), curve));
        }
      }
      const marks = make("g");
      svg.append(marks);
      mark = () => {
        if (cursor === null) return;
        const at = x(data.epochs[cursor]);
        const line = make("line", { class: "cursor", x1: at, x2: at, y1: box.top, y2: box.bottom });
        const dots = shown.filter((curve) => y(curve.mean[cursor]) !== null).map((curve) =>
          painted(make("circle", { class: "dot swatched", cx: at, cy: y(curve.mean[cursor]), r: 3.2 }), curve));
        marks.replaceChildren(line, ...dots);
      };
      mark();
    }

    function band(curve, x, y) {
      const at = data.epochs.map((epoch, i) => [x(epoch), y(curve.low[i]), y(curve.high[i])])
        .filter(([, low, high]) => low !== null && high !== null);
      const outline = [...at.map(([a, low]) => [a, low]), ...at.reverse().map(([a, , high]) => [a, high])];
      return make("path", { class: "band swatched", d: path(outline) });
    }

    function painted(element, curve) {
      colour(element, curve.label, data.labels.length);
      return element;
    }
    draw();
  }

  // Points between gaps, of which a line shows nothing.
  function lone(points) {
    const gap = (i) => (points[i]?.[1] ?? null) === null;
    return points.filter((_, i) => !gap(i) && gap(i - 1) && gap(i + 1));
  }

  function spansDecades(quantity) {
    const numbers = quantity.curves.flatMap((c) => c.mean).filter((v) => v !== null);
    const low = Math.min(...numbers);
    return low > 0 && Math.max(...numbers) / low > 30;
  }

  function valueScale(numbers, box, logarithmic) {
    const known = numbers.filter((v) => v !== null && (!logarithmic || v > 0));
    let [low, high] = known.length ? [Math.min(...known), Math.max(...known)] : [0.1, 1];
    if (logarithmic) {
      if (low === high) [low, high] = [low / 2, high * 2];
      const inner = scale(Math.log10(low), Math.log10(high), box.bottom, box.top);
      const of = (v) => (v === null || v <= 0 ? null : inner(Math.log10(v)));
      of.ticks = decades(low, high);
      return of;
    }
    const margin = (high - low || Math.abs(high) || 1) * 0.04;
    const inner = scale(low - margin, high + margin, box.bottom, box.top);
    const of = (v) => (v === null ? null : inner(v));
    of.ticks = ticks(low - margin, high + margin, 5);
    return of;
  }

  function drawAxes(svg, box, x, y, title) {
    for (const value of y.ticks) {
      const at = y(value);
      svg.append(make("line", { class: "grid", x1: box.left, x2: box.right, y1: at, y2: at }));
      svg.append(make("text", { x: box.left - 8, y: at + 4, "text-anchor": "end" }, short(value)));
    }
    const [first, last] = x.domain;
    for (const value of ticks(first, last, Math.max(2, Math.floor((box.right - box.left) / 90)))) {
      if (value % 1) continue;
      const anchor = { x: x(value), y: box.bottom + 17, "text-anchor": "middle" };
      svg.append(make("text", anchor, String(value)));
    }
    svg.append(make("text", { x: box.right, y: box.bottom + 33, "text-anchor": "end" }, "epoch"));
    svg.append(make("text", { x: box.left, y: box.bottom + 33 }, `↑ ${title}`));
  }

  // -- confusion matrix and accuracies of classes -----------------------------------------------------

  function confusion(figure, data) {
    const place = make("div", { class: "side" });
    const show = (index) => {
      const { label, classes, counts } = data[index];
      const bars = classBars(classes, counts, label);
      place.replaceChildren(scrolling(matrix(classes, counts, label), "Confusion matrix"), bars);
    };
    const names = data.map((option) => option.label);
    figure.append(make("div", { class: "choose" }, select("Model", names, show)), place);
    show(0);
  }

  function matrix(classes, counts, label) {
    const head = make("tr", {}, make("td"), ...classes.map((name) => make("th", { scope: "col" }, name)));
    const rows = counts.map((row, actual) => {
      const total = row.reduce((sum, n) => sum + n, 0);
      return make("tr", {}, make("th", { scope: "row" }, classes[actual]), ...row.map((n, predicted) => {
        const cell = make("td", { title: `${classes[actual]} taken for ${classes[predicted]}: ${n} of ${total}` },
          n ? String(n) : "·");
        // The root shows rare mistakes; at most 60%, on which text is legible in light and dark.
        const share = total ? 60 * Math.sqrt(n / total) : 0;
        const ink = actual === predicted ? "#0072b2" : "#d55e00";
        if (n) cell.style.backgroundColor = `color-mix(in srgb, ${ink} ${share.toFixed(1)}%, transparent)`;
        return cell;
      }));
    });
    return make("table", { class: "matrix" }, make("caption", {}, `${label}: class by predicted class`),
      make("thead", {}, head), make("tbody", {}, ...rows));
  }

  function classBars(classes, counts, label) {
    const rows = counts.map((row, index) => {
      const total = row.reduce((sum, n) => sum + n, 0);
      const bar = make("div", { class: "bar" });
      bar.style.width = total ? `${(100 * row[index]) / total}%` : "0";
      return make("tr", {}, make("th", { scope: "row" }, classes[index]), make("td", { class: "fill" }, bar),
        make("td", { class: "number" }, total ? `${((100 * row[index]) / total).toFixed(1)}%` : MISSING));
    });
    return make("table", { class: "bars" }, make("caption", {}, `${label}: share of each class recognised`),
      make("tbody", {}, ...rows));
  }

  // -- maps of a sweep --------------------------------------------------------------------------------

  function heatMap(figure, data) {
    const chosen = [0, 1];
    const titles = data.axes.map((axis) => axis.title);
    const place = make("div");
    const choices = ["Rows", "Columns"].map((label, side) =>
      select(label, titles, (index) => {
        if (chosen[1 - side] === index) {
          chosen[1 - side] = chosen[side];
          choices[1 - side].querySelector("select").selectedIndex = chosen[side];
        }
        chosen[side] = index;
        draw();
      }, side));
    figure.append(make("div", { class: "choose" }, ...choices), place);

    function draw() {
      const [down, across] = chosen.map((index) => data.axes[index]);
      const best = new Map();
      data.scores.forEach((score, i) => {
        const key = `${down.at[i]} ${across.at[i]}`;
        if (score !== null && !(best.get(key) >= score)) best.set(key, score);
      });
      const low = Math.min(...best.values());
      const high = Math.max(...best.values());
      const rows = down.values.map((value, i) => make("tr", {}, make("th", { scope: "row" }, value),
        ...across.values.map((_, j) => {
          const score = best.get(`${i} ${j}`);
          const cell = make("td", {}, score === undefined ? MISSING : score.toFixed(4));
          if (score !== undefined) paintCell(cell, high > low ? (score - low) / (high - low) : 1);
          return cell;
        })));
      const head = make("tr", {}, make("td"), ...across.values.map((v) => make("th", { scope: "col" }, v)));
      const caption = make("caption", {}, `${down.title} (rows) by ${across.title} (columns)`);
      place.replaceChildren(scrolling(make("table", { class: "matrix heat" }, caption,
        make("thead", {}, head), make("tbody", {}, ...rows)), "Heat map"));
    }
    draw();
  }

  function paintCell(cell, share) {
    const colours = viridis(share);
    const light = colours.map((v) => (v / 255 <= 0.04045 ? v / 3294.6 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    const luminance = 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2];
    cell.style.backgroundColor = `rgb(${colours})`;
    cell.style.color = luminance > 0.179 ? "#000" : "#fff";
  }

  function parallel(figure, data) {
    const plot = make("div", { class: "scroll plot" });
    const readout = make("p", { class: "readout", role: "status" });
    figure.append(plot, readout);
    const known = data.scores.filter((score) => score !== null);
    const low = Math.min(...known);
    const high = Math.max(...known);
    let lit = null;

    onWidth(plot, (available) => {
      const width = Math.max(available, 116 * (data.axes.length + 1));
      const box = { left: 46, right: width - 64, top: 34, bottom: 286 };
      const across = scale(0, data.axes.length, box.left, box.right);
      const heights = data.axes.map((axis) => spread(axis.values.length, box));
      const y = scale(low, high === low ? low + 1 : high, box.bottom, box.top);
      const svg = make("svg", { width, height: 312, tabindex: 0, role: "application",
        "aria-label": "Candidates from their parameters to their score; arrow keys step through them" });
      const lines = data.scores.map((score, i) => {
        // candidates that share a value are fanned out, the best on top
        const fan = data.scores.length > 1 ? i / (data.scores.length - 1) - 0.5 : 0;
        const points = data.axes.map((axis, j) => [across(j), heights[j](axis.at[i]) + fan * FAN]);
        const d = path([...points, [box.right, y(score)]]);
        const line = make("path", { class: "line swatched", d });
        const share = high > low ? (score - low) / (high - low) : 1;
        shade(line, 1 - share);
        return [line, make("path", { class: "reach", d })];
      });
      // the best are drawn last, above the others
      for (const [line] of [...lines].reverse()) svg.append(line);
      const light = (index) => {
        lit = index;
        lines.forEach(([line], i) => line.classList.toggle("lit", i === index));
        svg.classList.toggle("dimmed", index !== null);
        readout.textContent = index === null ? "" : describe(index);
        if (index !== null) svg.insertBefore(lines[index][0], lines.at(-1)[1]);
      };
      [...lines].reverse().forEach(([, reach]) => svg.append(reach));
      lines.forEach(([, reach], i) => {
        reach.addEventListener("pointerenter", () => light(i));
        reach.addEventListener("pointerdown", () => light(i));
      });
      svg.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && light(null));
      steps(svg, (step) => light(lit === null ? 0 : Math.min(lines.length - 1, Math.max(0, lit + step))));
      data.axes.forEach((axis, i) => drawAxis(svg, across(i), box, axis.title,
        labels(axis.values.map((value, j) => [heights[i](j), value]))));
      const scores = ticks(low, high, 5).map((value) => [y(value), short(value)]);
      drawAxis(svg, across(data.axes.length), box, "score", scores, "start");
      plot.replaceChildren(svg);
      if (lit !== null) light(lit);
    });

    function describe(index) {
      const settings = data.axes.map((axis) => `${axis.title} ${axis.values[axis.at[index]]}`);
      return `Rank ${data.ranks[index]}: score ${short(data.scores[index])}; ${settings.join(", ")}`;
    }
  }

  function spread(count, box) {
    return count > 1 ? scale(0, count - 1, box.bottom, box.top) : () => (box.top + box.bottom) / 2;
  }

  // Of many values as many as can be read.
  function labels(values) {
    const every = Math.ceil(values.length / 14);
    return values.filter((_, i) => i % every === 0);
  }

  function drawAxis(svg, at, box, title, marks, side = "end") {
    svg.append(make("line", { class: "grid", x1: at, x2: at, y1: box.top, y2: box.bottom }));
    const first = at === box.left;
    const place = { x: first ? 0 : at, y: 14, "text-anchor": first ? "start" : "middle" };
    svg.append(make("text", place, clipped(title, 18)));
    for (const [y, value] of marks) {
      const x = side === "end" ? at - 6 : at + 6;
      svg.append(make("text", { x, y: y + 4, "text-anchor": side }, clipped(value, 12)));
    }
  }

  // -- gallery ------------------------------------------------------------------------------------

  function chooseModel(gallery) {
    const sections = [...gallery.querySelectorAll("section")];
    const show = (index) => sections.forEach((section, i) => { section.hidden = i !== index; });
    const choice = select("Model", sections.map((section) => section.dataset.label), show);
    sections[0].before(make("div", { class: "choose" }, choice));
    show(0);
  }

  // -- elements, scales, numbers ---------------------------------------------------------------------

  function make(name, attributes = {}, ...children) {
    const element = SVG_NAMES.has(name)
      ? document.createElementNS("http://www.w3.org/2000/svg", name)
      : document.createElement(name);
    set(element, attributes);
    element.append(...children); // strings become text
    return element;
  }

  function set(element, attributes) {
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  }

  function select(label, names, choose, start = 0) {
    const list = make("select", {}, ...names.map((name) => make("option", {}, name)));
    list.selectedIndex = start;
    list.addEventListener("change", () => choose(list.selectedIndex));
    return make("label", {}, `${label} `, list);
  }

  function scrolling(table, label) {
    return make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, table);
  }

  // Draw once there is a width, which a closed <details> has not, and again when it changes.
  function onWidth(place, draw) {
    let width = 0;
    new ResizeObserver(() => {
      const now = Math.floor(place.clientWidth);
      if (now && now !== width) draw((width = now));
    }).observe(place);
    return () => width && draw(width);
  }

  function steps(svg, move) {
    const by = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 };
    svg.addEventListener("keydown", (event) => {
      if (!(event.key in by)) return;
      event.preventDefault();
      move(by[event.key]);
    });
  }

  function scale(low, high, from, to) {
    const size = high - low || 1;
    const of = (value) => from + ((value - low) / size) * (to - from);
    of.inverse = (at) => low + ((at - from) / (to - from)) * size;
    of.domain = [low, high];
    return of;
  }

  function ticks(low, high, count) {
    if (!(high > low)) return [low];
    const rough = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
    const found = [];
    for (let i = Math.ceil(low / step); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
    return found;
  }

  function decades(low, high) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      for (const digit of high / low > 100 ? [1] : [1, 2, 5]) {
        const value = Number(`${digit}e${power}`);
        if (value >= low && value <= high) found.push(value);
      }
    }
    return found.length ? found : [low, high];
  }

  function path(points) {
    let pen = "M";
    let d = "";
    for (const [x, y] of points) {
      if (y === null) { pen = "M"; continue; }
      d += `${pen}${x.toFixed(1)} ${y.toFixed(1)}`;
      pen = "L";
    }
    return d;
  }

  function nearest(sorted, value) {
    let best = 0;
    sorted.forEach((each, i) => { if (Math.abs(each - value) < Math.abs(sorted[best] - value)) best = i; });
    return best;
  }

  // Few curves have colours of their own; many run from bright to dark in the order of rank.
  function colour(element, index, count) {
    if (count > 7) return shade(element, count > 1 ? index / (count - 1) : 0);
    element.style.setProperty("--light", `var(--c${index})`);
    element.style.setProperty("--dark", `var(--c${index})`);
  }

  // 0, the best, is the brightest that shows on the page: of a light one the yellows do not.
  function shade(element, share) {
    element.style.setProperty("--light", `rgb(${viridis(0.58 * (1 - share))})`);
    element.style.setProperty("--dark", `rgb(${viridis(1 - 0.58 * share)})`);
  }

  function viridis(share) {
    const place = Math.min(1, Math.max(0, share)) * (VIRIDIS.length - 1);
    const below = Math.min(VIRIDIS.length - 2, Math.floor(place));
    return VIRIDIS[below].map((v, i) => Math.round(v + (place - below) * (VIRIDIS[below + 1][i] - v)));
  }

  function short(value) {
    if (value === null || value === undefined) return MISSING;
    const size = Math.abs(value);
    if (Number.isInteger(value) && size < 1e6) return String(value);
    const text = size >= 1e-3 && size < 1e5 ? String(Number(value.toPrecision(4))) : value.toExponential(1);
    return text.replace("-", "−");
  }

  function aligned(value) {
    const plain = Number.isFinite(value) && Math.abs(value) >= 1e-3 && Math.abs(value) < 1e4;
    return plain ? value.toPrecision(4).replace("-", "−") : short(value);
  }

  function words(name) {
    return name.replaceAll("_", " ");
  }

  function clipped(text, length) {
    return text.length > length ? `${text.slice(0, length - 1)}…` : text;
  }
})();
