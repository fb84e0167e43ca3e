"use strict";
// The page: head, overview, list, theme, and the feature that the address names.

function setUpTheme() {
  const button = byId("theme"), system = matchMedia("(prefers-color-scheme: dark)");
  const stored = (value) => {  // a page opened from a file may lack storage
    try {
      if (value) localStorage.setItem("tsae-theme", value);
      return localStorage.getItem("tsae-theme");
    } catch {
      return null;
    }
  };
  let theme = stored();
  const dark = () => (theme ? theme === "dark" : system.matches);
  const show = () => {
    if (theme) document.documentElement.dataset.theme = theme;
    button.setAttribute("aria-pressed", dark());
  };
  button.addEventListener("click", () => {
    theme = dark() ? "light" : "dark";
    stored(theme);
    show();
  });
  system.addEventListener("change", show);
  show();
}

function numbers() {
  const m = data.evaluation.metrics;
  const at = (key) => key.split(".").reduce((inside, part) => inside?.[part], m);
  const metric = (key, means) => [data.labels[key].name, at(key), (v) => v.toFixed(data.labels[key].digits), means];
  const dwell = known(features.dwell.filter((_, f) => features.active[f] >= data.min_activations)).sort((a, b) => a - b);
  const shuffled = at("temporal.persistence_excess_shuffled"), memoryless = at("temporal.support_bits_memoryless");
  return [
    metric("explained_variance", "1 is a perfect reconstruction, 0 no better than the mean activation"),
    metric("ce_loss_score_mean_ablation", "fraction of what the language model loses when the mean replaces the activation"),
    metric("temporal.support_bits",
      "per token, to say which features are on" + (memoryless === undefined ? "" : `; ${memoryless.toFixed(1)} without the token before`)),
    metric("temporal.total_bits", "per token, to say which features are on and how strongly"),
    metric("l0", `of ${whole(count)}; fewer are easier to read`),
    metric("frac_alive", "fraction that was on at least once in the evaluation"),
    metric("temporal.persistence_excess",
      "0: on at random, 1: never switches off" + (shuffled === undefined ? "" : `; ${shuffled.toFixed(3)} with the tokens shuffled`)),
    ["median dwell time", quantile(dwell, 0.5), (v) => `${v.toFixed(2)} tokens`, "how long a feature stays on, on average; half of the features stay longer"],
  ];
}

function overviewCharts() {
  const h = data.history, m = data.evaluation.metrics;
  const lags = data.lags.map(Math.log2);
  const columns = features.autocorrelation.map((column) => known(column).sort((a, b) => a - b));
  const bands = features.band_autocorrelation.map((column) => known(column).sort((a, b) => a - b));
  const spread = (sorted) => [0.1, 0.9].map((share) => quantile(sorted, share));
  const out = [
    trainingCard({title: "Loss terms", text: "In training, logarithmic.", log: true, curves: [
      ["reconstruction", "blue", h.reconstruction], ["sparsity", "orange", h.sparsity],
      ["temporal", "green", h.temporal], ["auxiliary", "purple", h.auxiliary]]}),
    trainingCard({title: data.labels.explained_variance.title, text: "Of training batches; its first steps may lie below.", from: "end",
      curves: [["training", "blue", h.explained_variance]], level: m.explained_variance === undefined ? null : ["held-out", m.explained_variance]}),
    trainingCard({title: data.labels.l0.title, text: "Training batches.", from: 0, curves: [["training", "blue", h.l0]]}),
    trainingCard({title: "Dead features", text: "Silent for long, in training.", from: 0, curves: [["dead", "blue", h.dead]]}),
    trainingCard({title: "Correlation at lag 1", text: "Mean over the features, in training; shaded, the middle 80 %.", from: 0,
      curves: [["mean", "blue", h.lag1_correlation]],
      spread: h.lag1_correlation_p10 ? [h.lag1_correlation_p10, h.lag1_correlation_p90, "blue"] : null}),
  ];
  if (columns.some((column) => column.length)) {
    const low = Math.min(0, ...columns.map((c) => spread(c)[0])), high = Math.max(...columns.map((c) => spread(c)[1]));
    out.push(card("Autocorrelation by lag", "Mean over the features on this page's text; shaded, the middle 80 %.", drawing((width) => axes(width, {
      label: "Mean autocorrelation: " + data.lags.map((lag, i) => `${fixed(overall()[i], 3)} at lag ${lag}`).join(", "),
      x: {low: lags[0], high: lags[lags.length - 1], marks: lags, text: (x) => 2 ** x, label: "lag (tokens)"},
      y: {low, high, marks: ticks(low, high, 4)},
      parts(px, py, svg) {
        const [lower, upper] = [0, 1].map((side) => columns.map((c) => spread(c)[side]));
        svg.append(shape("path", {class: "spread blue", d:
          `${path(lags, lower, px, py)}${path([...lags].reverse(), upper.reverse(), px, py).replace("M", "L")}Z`}));
        svg.append(shape("path", {class: "curve blue", d: path(lags, overall(), px, py)}));
        overall().forEach((v, i) => v !== null && svg.append(shape("circle", {class: "dot blue", r: 3, cx: px(lags[i]), cy: py(v)})));
      },
    }))));
    const full = bands.map((c) => mean(c));
    const floor = Math.min(0, ...known(bands.map((c) => spread(c)[0])));
    const top = 1.1 * Math.max(0.01, ...known(bands.map((c) => spread(c)[1])));
    out.push(card("Autocorrelation by band", "All pairs of tokens so far apart; the bar is the mean, the line the middle 80 % of features.", drawing((width) => axes(width, {
      label: "Mean autocorrelation: " + data.bands.map(([a, b], i) => `${fixed(full[i], 3)} at lags ${a} to ${b}`).join(", "),
      x: {low: -0.5, high: bands.length - 0.5, marks: bands.map((_, i) => i), text: (i) => data.bands[i].join("–"), label: "lags (tokens)"},
      y: {low: floor, high: top, marks: ticks(floor, top, 4)},
      parts(px, py, svg) {
        full.forEach((v, i) => {
          if (v === null) return;
          const half = (px(1) - px(0)) * 0.28, [a, b] = spread(bands[i]);
          svg.append(shape("rect", {class: "bars blue", x: px(i) - half, width: 2 * half, y: py(Math.max(v, 0)), height: Math.abs(py(v) - py(0))}));
          svg.append(shape("line", {class: "curve soft", x1: px(i), x2: px(i), y1: py(a), y2: py(b)}));
          svg.append(shape("text", {x: px(i), y: py(Math.max(b, v)) - 5, "text-anchor": "middle"}, fixed(v, 3)));
        });
      },
    }))));
  }
  const silent = features.active.filter((n) => n === 0).length;
  out.push(histogramCard({title: "How often features are on", text: `Share of tokens, logarithmic. ${whole(silent)} of ${whole(count)} never are in this text.`,
    values: features.density, log: true, label: "share of tokens", colour: "blue"}));
  out.push(histogramCard({title: "How long they stay on", text: "Dwell time, logarithmic; features that are on often enough to judge.",
    values: features.dwell.filter((_, f) => features.active[f] >= data.min_activations), log: true, label: "tokens", colour: "green"}));
  return out;
}

function setUpOverview() {
  byId("name").textContent = data.run.name;
  byId("facts").append(...data.run.facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
  const text = data.evaluation.text;
  byId("evaluated").textContent = !Object.keys(data.evaluation.metrics).length
    ? "The run was not evaluated: python -m tsae.evaluate measures what is missing here."
    : text ? `The first numbers were measured on other text: ${text}.` : "Measured on held-out text, which training never saw.";
  byId("numbers").append(...numbers().map(([name, value, form, means]) => element("div", {}, element("dt", {}, name),
    element("dd", {class: "value"}, typeof value === "number" ? form(value) : "–"), element("dd", {class: "means"}, means))));
  byId("charts").append(...overviewCharts());
}

function openFromAddress() {
  const named = /^#feature-(\d+)$/.exec(location.hash);
  if (named && +named[1] < count) openFeature(+named[1]);
}

setUpTheme();
setUpOverview();
setUpList();
byId("detail").addEventListener("keydown", (event) => {
  if (event.key === "Escape") backToList();
});
addEventListener("popstate", openFromAddress);
if (/^#feature-/.test(location.hash)) openFromAddress();
else if (state.order.length) {
  state.open = state.order[0];
  showFeature(state.open);
  drawRows();
}
document.documentElement.dataset.ready = Math.round(performance.now());
