"use strict";
// Elements, scales, and the charts of the overview. No code on this page builds markup from strings.

function element(name, options = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(options)) {
    if (key === "class") made.className = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function shape(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// Three digits and a unit: 0.034, 12.5, 1.5k.
function short(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  for (const [limit, unit] of [[1e9, "B"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= limit) return `${+(value / limit * (limit === 1e4 ? 10 : 1)).toPrecision(3)}${unit}`;
  }
  return size !== 0 && size < 1e-3 ? value.toExponential(1) : `${+value.toPrecision(3)}`;
}

const fixed = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const percent = (value) => (value === null || value === undefined ? "–" : `${+(100 * value).toPrecision(2)} %`);
const whole = (value) => value.toLocaleString("en-US");
const known = (values) => values.filter((value) => value !== null);
const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);

function quantile(sorted, share) {
  if (!sorted.length) return null;
  const place = share * (sorted.length - 1), low = Math.floor(place);
  return sorted[low] + (place - low) * (sorted[Math.min(low + 1, sorted.length - 1)] - sorted[low]);
}

function ticks(low, high, count) {
  const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= rough);
  const out = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) out.push(+(i * step).toPrecision(12));
  return out;
}

// Round numbers between two powers of ten, as their logarithms.
function logTicks(low, high) {
  for (const digits of [[1, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1]]) {
    const out = [];
    for (let e = Math.floor(low); e <= high; e++) out.push(...digits.map((d) => e + Math.log10(d)));
    const marks = out.filter((mark) => mark >= low - 1e-9 && mark <= high + 1e-9);
    if (marks.length <= 6) return marks;
  }
  return powers(low, high);
}

const powers = (low, high) => {
  const out = [];
  for (let e = Math.ceil(low - 1e-9); e <= high + 1e-9; e++) out.push(e);
  const every = Math.ceil(out.length / 6);
  return out.filter((_, i) => i % every === 0);
};

// Superscripts, as "10⁻³".
const power = (e) => `10${String(e).replace(/./g, (c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]))}`;

// Redraws whenever the width of the place changes.
const resized = new ResizeObserver((entries) => {
  for (const { target, contentRect } of entries) {
    const width = Math.round(contentRect.width);
    if (width && target.drawnAt !== width) {
      target.drawnAt = width;
      target.draw(width);
    }
  }
});

function drawing(draw) {
  const place = element("div");
  place.draw = (width) => place.replaceChildren(draw(width));
  resized.observe(place);
  return place;
}

/* A chart with axes: {x: {low, high, marks, text, label}, y: the same, label, parts: (px, py, svg) => void} */
function axes(width, chart, height = 200) {
  const left = 46, right = 10, top = 8, bottom = 36;
  const px = (v) => left + (v - chart.x.low) / (chart.x.high - chart.x.low || 1) * (width - left - right);
  const py = (v) => height - bottom - (v - chart.y.low) / (chart.y.high - chart.y.low || 1) * (height - top - bottom);
  const svg = shape("svg", {viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": chart.label});
  for (const mark of chart.y.marks) {
    svg.append(shape("line", {class: "grid", x1: left, x2: width - right, y1: py(mark), y2: py(mark)}));
    svg.append(shape("text", {x: left - 6, y: py(mark) + 4, "text-anchor": "end"}, (chart.y.text ?? short)(mark)));
  }
  for (const mark of chart.x.marks) {
    svg.append(shape("text", {x: px(mark), y: height - bottom + 16, "text-anchor": "middle"}, (chart.x.text ?? short)(mark)));
  }
  svg.append(shape("line", {class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom}));
  svg.append(shape("text", {x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle"}, chart.x.label));
  chart.parts(px, py, svg);
  return svg;
}

function path(xs, ys, px, py) {
  let out = "", open = false;
  xs.forEach((x, i) => {
    const there = ys[i] !== null && Number.isFinite(ys[i]);
    if (there) out += `${open ? "L" : "M"}${px(x).toFixed(1)} ${py(ys[i]).toFixed(1)}`;
    open = there;
  });
  return out;
}

function card(title, text, content, names = []) {
  const legend = element("ul", {class: "legend"}, ...names.map(([name, colour]) => element("li", {class: colour}, name)));
  return element("figure", {class: "card"},
    element("figcaption", {}, element("strong", {}, title), text), content, ...(names.length ? [legend] : []));
}

/* Curves over training steps: {title, text, log, curves: [[name, colour, [steps, values]]], level: [name, value]} */
function trainingCard({title, text, curves, log = false, level = null, spread = null, from = null}) {
  curves = curves.filter(([, , series]) => series);
  if (log) {
    curves = curves.map(([name, colour, [x, y]]) => [name, colour, [x, y.map((v) => (v > 0 ? Math.log10(v) : null))]])
      .filter(([, , [, y]]) => y.some((v) => v !== null));
  }
  if (!curves.length) return card(title, "Not in this run's training log.", "");
  const limits = [...(level ? [level[1]] : []), ...(spread ? [...spread[0][1], ...spread[1][1]] : [])];
  const values = known([...curves.flatMap(([, , [, y]]) => y), ...limits]).sort((a, b) => a - b);
  const steps = curves.flatMap(([, , [x]]) => x);
  let low = from === null ? values[0] : Math.min(from, values[0]), high = values[values.length - 1];
  if (from === "end") low = Math.max(values[0], quantile(values, 0.15) - 0.2 * (high - quantile(values, 0.15)));
  if (high === low) high = low + 1;
  if (log) [low, high] = [Math.floor(low), Math.ceil(high)];
  const chart = {
    label: `${title} over ${whole(steps[steps.length - 1])} steps, at the end ` +
      curves.map(([name, , [, y]]) => `${name} ${short(log ? 10 ** y[y.length - 1] : y[y.length - 1])}`).join(", "),
    x: {low: Math.min(...steps), high: Math.max(...steps), marks: ticks(Math.min(...steps), Math.max(...steps), 4), label: "step"},
    y: {low, high, marks: log ? powers(low, high) : ticks(low, high, 4), text: log ? power : short},
    parts(px, py, svg) {
      const inside = (v) => py(v === null ? v : Math.max(v, low));
      if (spread) {
        const [x, lower] = spread[0], upper = spread[1][1];
        svg.append(shape("path", {class: `spread ${spread[2]}`, d:
          `${path(x, lower, px, inside)}${path([...x].reverse(), [...upper].reverse(), px, inside).replace("M", "L")}Z`}));
      }
      if (level) svg.append(shape("line", {class: "dashed red", x1: px(chart.x.low), x2: px(chart.x.high), y1: py(level[1]), y2: py(level[1])}));
      for (const [, colour, [x, y]] of curves) svg.append(shape("path", {class: `curve ${colour}`, d: path(x, y, px, inside)}));
    },
  };
  const names = curves.map(([name, colour]) => [name, colour]).concat(level ? [[level[0], "red"]] : []);
  return card(title, text, drawing((width) => axes(width, chart)), names.length > 1 ? names : []);
}

/* A histogram of the values, or of their log10. */
function histogramCard({title, text, values, log, label, colour}) {
  const numbers = known(values).filter((v) => !log || v > 0).map((v) => (log ? Math.log10(v) : v));
  if (!numbers.length) return card(title, "There is nothing to count.", "");
  const wanted = (Math.max(...numbers) - Math.min(...numbers)) / 24;  // about two dozen bins
  const width = [0.025, 0.05, 0.125].find((w) => w >= wanted) ?? 0.25;
  const low = Math.floor(Math.min(...numbers) / width + 1e-6) * width, bins = [];
  for (const v of numbers) {
    const bin = Math.floor((v - low) / width + 1e-6);
    bins[bin] = (bins[bin] ?? 0) + 1;
  }
  const high = low + width * bins.length, top = Math.max(...known([...bins].map((n) => n ?? null)));
  const middle = low + width * (bins.indexOf(top) + 0.5), peak = log ? 10 ** middle : middle;
  const chart = {
    label: `${title}: ${whole(numbers.length)} features, most of them near ${short(peak)}`,
    x: {low, high, marks: log ? logTicks(low, high) : ticks(low, high, 5),
      text: log ? (e) => (high - low > 2.5 && Number.isInteger(e) ? power(e) : short(10 ** e)) : short, label},
    y: {low: 0, high: top, marks: ticks(0, top, 4)},
    parts(px, py, svg) {
      bins.forEach((n, i) => svg.append(shape("rect", {class: `bars ${colour}`, x: px(low + i * width) + 0.5, y: py(n),
        width: Math.max(px(low + width) - px(low) - 1, 1), height: py(0) - py(n)})));
    },
  };
  return card(title, text, drawing((place) => axes(place, chart)));
}
