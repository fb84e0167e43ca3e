"use strict";
// One feature: its numbers, and its strongest passages with its activation over time and its neighbour's.

const WINDOW = 64;  // tokens of a passage shown at first
const LEAD = 24;  // of them before the peak
const T = data.rows.length ? unpack(data.rows[0]).length : 0;

// Integers from base64 varints: 7 bits per byte, low bits first, bit 7 set on all bytes of a number except the last.
function unpack(text) {
  const bytes = atob(text), out = [];
  let value = 0, shift = 0;
  for (let i = 0; i < bytes.length; i++) {
    const byte = bytes.charCodeAt(i);
    value |= (byte & 127) << shift;
    if (byte & 128) shift += 7;
    else {
      out.push(value);
      value = shift = 0;
    }
  }
  return out;
}

const unpacked = new Map();
function entries(f) {
  if (!unpacked.has(f)) {
    let place = 0;
    const positions = unpack(features.positions[f]).map((step) => (place += step));
    unpacked.set(f, {positions, steps: unpack(features.activations[f])});
  }
  return unpacked.get(f);
}

// The activation of a feature at each token of a run, and where hysteresis holds it on below the switch-on threshold.
function activation(f, run) {
  const [line, start, length] = data.runs[run], begin = line * T + start, {positions, steps} = entries(f);
  const values = new Float64Array(length), held = new Uint8Array(length);
  let low = 0, high = positions.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (positions[middle] < begin) low = middle + 1;
    else high = middle;
  }
  for (; low < positions.length && positions[low] < begin + length; low++) {
    values[positions[low] - begin] = (steps[low] >> 1) / data.levels * features.peak[f];
    held[positions[low] - begin] = steps[low] & 1;
  }
  return {values, held};
}

const limits = (f) => ({on: features.threshold?.[f] ?? null, release: features.release?.[f] ?? null});

function openFeature(f, focus = false) {
  state.open = f;
  showFeature(f);
  drawRows();
  if (location.hash !== `#feature-${f}`) history.pushState(null, "", `#feature-${f}`);
  if (focus || matchMedia("(max-width: 1100px)").matches) {
    byId("detail-title").focus({preventScroll: true});
    byId("detail").scrollIntoView({block: "start"});
  }
}

function showFeature(f) {
  const other = features.neighbour[f];
  const neighbour = other < 0
    ? element("p", {class: "note"}, `It has no neighbour: features on fewer than ${data.min_activations} times are left out.`)
    : element("p", {class: "note"}, "Neighbour in time: ",
      element("button", {type: "button", class: "link", onclick: () => openFeature(other, true)}, `feature ${other}`),
      `. Of all others its activation ${data.neighbour_lags.join(" to ")} tokens later goes most with this one's ` +
      `(correlation ${fixed(features.neighbour_correlation[f], 2)}).`);
  const stats = [
    ["on at", `${percent(features.density[f])} of tokens`],
    ["on, in all", `${whole(features.active[f])} times`],
    ["stays on", fixed(features.persistence[f], 3)],
    ["beyond chance", fixed(features.excess[f], 3)],
    ["dwell time, tokens", fixed(features.dwell[f], 2)],
    ["largest activation", short(features.peak[f])],
    ...(limits(f).on === null ? [] : [["switches on above", short(limits(f).on)]]),
    ...(limits(f).release === null ? [] : [["stays on above", short(limits(f).release)]]),
  ];
  const head = element("h3", {id: "detail-title", tabindex: -1}, `Feature ${f}`);
  const place = state.order.indexOf(f);
  const wide = (text) => element("span", {class: "wide"}, text);
  const step = (by) => {
    const next = place < 0 ? undefined : state.order[place + by];
    const go = () => {
      activate(place + by);
      openFeature(next, true);
    };
    return element("button", {type: "button", "aria-label": by < 0 ? "Previous feature" : "Next feature",
      disabled: next === undefined ? "" : null, onclick: go}, ...(by < 0 ? ["‹", wide(" Previous")] : [wide("Next "), "›"]));
  };
  const facts = element("div", {class: "card"},
    element("dl", {class: "stats"}, ...stats.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)))),
    element("p", {class: "note"}, "Fires most on ", ...chips(features.tokens[f])), neighbour);
  const passages = features.passages[f].map((run, i) => passage(f, other, run, i + 1));
  byId("detail").replaceChildren(
    element("div", {class: "titles"}, head, element("button", {type: "button", class: "back", onclick: backToList}, "To the list"), step(-1), step(1)),
    facts, passageLegend(f, other, passages.length), ...passages, memoryCard(f));
}

function backToList() {
  list.focus();
  byId("features-title").scrollIntoView({block: "start"});
}

function memoryCard(f) {
  const own = data.lags.map((_, i) => features.autocorrelation[i][f]), xs = data.lags.map(Math.log2);
  const all = overall();
  const values = known([...own, ...all]);
  if (!known(own).length) return "";
  const chart = {
    label: `Autocorrelation of feature ${f}: ` + data.lags.map((lag, i) => `${fixed(own[i], 2)} at lag ${lag}`).join(", "),
    x: {low: xs[0], high: xs[xs.length - 1], marks: xs, text: (x) => 2 ** x, label: "lag (tokens)"},
    y: {low: Math.min(0, ...values), high: Math.max(...values, 0.1), marks: ticks(Math.min(0, ...values), Math.max(...values, 0.1), 5)},
    parts(px, py, svg) {
      svg.append(shape("path", {class: "curve soft", d: path(xs, all, px, py)}), shape("path", {class: "curve blue", d: path(xs, own, px, py)}));
      own.forEach((v, i) => v !== null && svg.append(shape("circle", {class: "dot blue", r: 3, cx: px(xs[i]), cy: py(v)})));
    },
  };
  return card("Memory over lags", "Correlation of the activation with itself at each lag in tokens; all pairs together, " +
    data.bands.map(([low, high], i) => `${fixed(features.band_autocorrelation[i][f], 3)} at lags ${low} to ${high}`).join(", ") + ".",
    drawing((width) => axes(width, chart, 150)), [["this feature", "blue"], ["mean of all", "soft"]]);
}

let overallCurve = null;
function overall() {
  overallCurve ??= features.autocorrelation.map((column) => mean(known(column)));
  return overallCurve;
}

function passageLegend(f, other, passages) {
  if (!passages) return element("p", {}, "It is never on in this text.");
  return element("div", {},
    element("h4", {}, `Strongest passages (${passages})`),
    element("p", {class: "note"}, "Tokens are shaded by the activation. ",
      ...(limits(f).release === null ? [] : ["Dots, in the text and on the curve: held on, below the threshold that switched it on. "]),
      ...(other < 0 ? [] : [`A line under a token: the neighbour, feature ${other}, is on. `]),
      "Point at the curve, or move along it with the arrow keys, to read values."));
}

function passage(f, other, run, number) {
  const [line, start, length] = data.runs[run];
  const tokens = unpack(data.rows[line]).slice(start, start + length).map((t) => data.texts[t]);
  const own = activation(f, run), beside = other < 0 ? null : activation(other, run);
  const peak = own.values.indexOf(Math.max(...own.values));
  const made = element("figure", {class: "card passage"});
  let all = length <= WINDOW;
  const first = () => (all ? 0 : Math.max(Math.min(peak - LEAD, length - WINDOW), 0));
  function draw() {
    const from = first(), to = all ? length : from + WINDOW;
    const part = {f, other, from, to, tokens, own, beside, peak};
    const on = own.values.slice(from, to).filter((v) => v > 0).length;
    const readout = element("p", {class: "readout"});
    const text = passageText(part), chart = timeChart(part, number, point);
    function point(i) {
      text.querySelector(".pointed")?.classList.remove("pointed");
      if (i === null) {
        readout.textContent = "";
        return;
      }
      const token = text.children[i - from];
      token.classList.add("pointed");
      if (token.offsetTop < text.scrollTop || token.offsetTop > text.scrollTop + text.clientHeight - 24) text.scrollTop = token.offsetTop - 40;
      readout.textContent = reading(part, i);
    }
    text.addEventListener("pointerover", (event) => {
      const i = [...text.children].indexOf(event.target.closest(".token"));
      if (i >= 0) chart.point(from + i);
    });
    const more = element("button", {type: "button", onclick: () => { all = !all; draw(); made.querySelector("button").focus(); }},
      all ? `Show ${WINDOW} tokens` : `Show all ${length} tokens`);
    made.replaceChildren(
      element("figcaption", {}, element("strong", {}, `Passage ${number}`), `peak ${short(own.values[peak])}, on at ${on} of ${to - from} tokens`),
      text, chart.place, element("div", {class: "under"}, readout, ...(length > WINDOW ? [more] : [])));
  }
  draw();
  requestAnimationFrame(() => {  // after layout: the peak may lie below the fold
    const text = made.querySelector(".text"), token = text.children[peak - first()];
    if (token.offsetTop > text.clientHeight - 30) text.scrollTop = token.offsetTop - text.clientHeight / 2;
  });
  return made;
}

function reading({f, other, tokens, own, beside}, i) {
  const what = (values) => (values[i] > 0 ? short(values[i]) : "off");
  return `“${visible(tokens[i])}”: ${what(own.values)}${own.held[i] ? " (held on)" : ""}` +
    (beside ? `; feature ${other}: ${what(beside.values)}` : "");
}

function passageText({f, from, to, tokens, own, beside}) {
  const text = element("p", {class: "text"});
  for (let i = from; i < to; i++) {
    const token = element("span", {class: "token"});
    tokens[i].split(/(\r?\n|\t)/).forEach((piece) => {
      if (piece.endsWith("\n")) token.append(element("span", {class: "break"}, "↵"), "\n");
      else token.append(piece);
    });
    if (own.values[i] > 0) {
      token.classList.add("on");
      token.style.setProperty("--share", `${Math.round(10 + 60 * own.values[i] / features.peak[f])}%`);
      if (own.held[i]) token.classList.add("held");
    }
    if (beside && beside.values[i] > 0) token.classList.add("beside");
    text.append(token);
  }
  return text;
}

/* The activation over the tokens, above the neighbour's on the same tokens; each with its own scale and thresholds. */
function timeChart(part, number, point) {
  const {f, other, from, to, own, beside} = part, n = to - from, left = 46, right = 10;
  let at = null, px = null, cursor = null, svg = null;
  const controller = {
    place: null,
    point(i) {
      at = i;
      cursor.setAttribute("visibility", i === null ? "hidden" : "visible");
      if (i !== null) {
        for (const end of ["x1", "x2"]) cursor.setAttribute(end, px(i));
        svg.setAttribute("aria-valuenow", i - from + 1);
        svg.setAttribute("aria-valuetext", reading(part, i));
      }
      point(i);
    },
  };
  controller.place = drawing((width) => {
    px = (i) => left + (i - from + 0.5) / n * (width - left - right);
    const height = beside ? 212 : 132;
    svg = shape("svg", {class: "time", viewBox: `0 0 ${width} ${height}`, height, tabindex: 0, role: "slider",
      "aria-label": `Passage ${number}: activation of feature ${f}${beside ? ` and feature ${other}` : ""} over ${n} tokens`,
      "aria-valuemin": 1, "aria-valuemax": n, "aria-valuenow": part.peak - from + 1, "aria-valuetext": reading(part, part.peak)});
    panel(svg, px, {...part, ...own, limits: limits(f), top: 16, bottom: 108, colour: "blue", name: `feature ${f}`, width, left, right});
    if (beside) panel(svg, px, {...part, ...beside, f: other, limits: limits(other), top: 134, bottom: 188, colour: "orange", name: `feature ${other}`, width, left, right});
    for (const mark of ticks(0, n - 1, Math.min(8, width / 60)).filter(Number.isInteger)) {
      svg.append(shape("text", {x: px(from + mark), y: height - 8, "text-anchor": "middle"}, mark + 1));
    }
    cursor = shape("line", {class: "cursor", y1: 12, y2: height - 22, x1: 0, x2: 0, visibility: "hidden"});
    svg.append(cursor);
    const under = (event) => {
      const box = svg.getBoundingClientRect();
      const i = from + Math.floor((event.clientX - box.left - left) / (width - left - right) * n);
      controller.point(Math.min(Math.max(i, from), to - 1));
    };
    svg.addEventListener("pointermove", under);
    svg.addEventListener("pointerdown", under);
    svg.addEventListener("pointerleave", () => controller.point(null));
    svg.addEventListener("blur", () => controller.point(null));
    svg.addEventListener("keydown", (event) => {
      const step = {ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 8, PageDown: -8, Home: -Infinity, End: Infinity}[event.key];
      if (step === undefined) return;
      event.preventDefault();
      controller.point(at === null && Number.isFinite(step) ? part.peak : Math.min(Math.max((at ?? part.peak) + step, from), to - 1));
    });
    return svg;
  });
  return controller;
}

function panel(svg, px, {from, to, values, held, limits, top, bottom, colour, name, width, left, right}) {
  const highest = Math.max(...values.slice(from, to), limits.on ?? 0) * 1.05 || 1;
  const py = (v) => bottom - v / highest * (bottom - top);
  svg.append(shape("text", {class: `label ${colour}`, x: left, y: top - 5}, name));
  svg.append(shape("line", {class: "axis", x1: left, x2: width - right, y1: bottom, y2: bottom}));
  let line = "", area = "";
  for (let i = from; i < to; i++) {
    line += `${i === from ? "M" : "L"}${px(i).toFixed(1)} ${py(values[i]).toFixed(1)}`;
  }
  area = `${line}L${px(to - 1).toFixed(1)} ${bottom}L${px(from).toFixed(1)} ${bottom}Z`;
  svg.append(shape("path", {class: `area ${colour}`, d: area}), shape("path", {class: `curve ${colour}`, d: line}));
  for (let i = from; i < to; i++) {
    if (held[i]) svg.append(shape("circle", {class: `held-dot ${colour}`, cx: px(i), cy: py(values[i]), r: 2.6}));
  }
  const levels = [["on", limits.on], ["release", limits.release]].filter(([, v]) => v !== null && v <= highest);
  const apart = levels.length < 2 || Math.abs(py(levels[0][1]) - py(levels[1][1])) > 11;
  for (const [what, v] of levels) {
    svg.append(shape("line", {class: `dashed ${what === "on" ? "red" : "green"}`, x1: left, x2: width - right, y1: py(v), y2: py(v)}));
    const y = py(v) + (apart ? 4 : what === "on" ? -2 : 9);
    svg.append(shape("text", {class: `label ${what === "on" ? "red" : "green"}`, x: left - 4, y, "text-anchor": "end"}, what));
  }
  svg.append(shape("text", {x: width - right, y: top - 5, "text-anchor": "end"}, `largest here ${short(Math.max(...values.slice(from, to)))}`));
}
