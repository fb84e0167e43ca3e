"use strict";
// The feature list: sorted, searched, and drawn only where visible, so that its length does not matter.

const data = JSON.parse(document.getElementById("data").textContent);
const features = data.features, count = features.density.length;
const LONG = data.lags.indexOf(16) < 0 ? data.lags.length - 1 : data.lags.indexOf(16);
const COLUMNS = [
  {key: "number", name: "Feature", value: (f) => f, text: (f) => String(f), up: true},
  {key: "tokens", name: "Fires most on"},
  {key: "density", name: "Density", value: (f) => features.density[f], text: (f) => percent(features.density[f]), means: "share of tokens at which it is on"},
  {key: "persistence", name: "Stays on", value: (f) => features.persistence[f], text: (f) => fixed(features.persistence[f], 3), means: "probability that it is on at the next token, given that it is on"},
  {key: "excess", name: "Beyond chance", value: (f) => features.excess[f], text: (f) => fixed(features.excess[f], 3), means: "the same with chance taken out: 0 for a feature that is on at random"},
  {key: "lag1", name: "Auto­corr. lag 1", value: (f) => features.autocorrelation[0][f], text: (f) => fixed(features.autocorrelation[0][f], 3), means: "correlation of its activation with itself one token later"},
  {key: "long", name: `Auto­corr. lag ${data.lags[LONG]}`, value: (f) => features.autocorrelation[LONG][f], text: (f) => fixed(features.autocorrelation[LONG][f], 3), means: `the same ${data.lags[LONG]} tokens later`},
  {key: "dwell", name: "Dwell time", value: (f) => features.dwell[f], text: (f) => fixed(features.dwell[f], 2), means: "mean length of a run of activations, in tokens"},
];
const ROW = 34, byId = (id) => document.getElementById(id);
const list = byId("list"), scroller = byId("scroller"), rows = byId("rows"), search = byId("search"), often = byId("often");
const state = {sort: "excess", up: false, order: [], active: 0, open: null};
const visible = (text) => text.replace(/\r?\n/g, "↵").replace(/\t/g, "→") || "∅";
const spoken = Array.from({length: count}, (_, f) => features.tokens[f].map((t) => data.texts[t].toLowerCase()));

function arrange() {
  const query = search.value.trim().toLowerCase(), column = COLUMNS.find((c) => c.key === state.sort);
  const rare = (f) => often.checked && features.active[f] < data.min_activations;
  const order = [];
  let hidden = 0;
  for (let f = 0; f < count; f++) {
    const exact = query === String(f);
    const number = /^\d+$/.test(query) && String(f).startsWith(query);
    if (query && !number && !spoken[f].some((text) => text.includes(query))) continue;
    if (rare(f) && !exact) hidden++;
    else order.push(f);
  }
  const sign = state.up ? 1 : -1;
  order.sort((a, b) => {
    const x = column.value(a), y = column.value(b);
    if (x === y) return a - b;
    return x === null ? 1 : y === null ? -1 : sign * (x - y);  // missing values come last in both orders
  });
  state.order = order;
  const open = order.indexOf(state.open);
  state.active = Math.max(open, 0);
  list.setAttribute("aria-rowcount", order.length + 1);
  rows.style.height = `${order.length * ROW}px`;
  scroller.scrollTop = Math.max(state.active * ROW - 3 * ROW, 0);
  byId("found").textContent = `${whole(order.length)} of ${whole(count)} features` +
    (hidden ? `; ${whole(hidden)} more on too rarely to judge` : "");
  for (const head of byId("head").children) {
    head.setAttribute("aria-sort", head.dataset.key === state.sort ? (state.up ? "ascending" : "descending") : "none");
    head.classList.toggle("shown", shown(head.dataset.key));
  }
  byId("sort").value = state.sort;
  byId("order").textContent = state.up ? "Lowest first" : "Highest first";
  drawRows();
}

// The one number that fits on a narrow screen.
const shown = (key) => key === (state.sort === "number" ? "excess" : state.sort);

function chips(tokens) {
  return tokens.map((t) => element("span", {class: "chip"}, visible(data.texts[t])));
}

function row(index) {
  const f = state.order[index];
  const cells = COLUMNS.map((column, i) => {
    const content = column.value ? [column.text(f)] : chips(features.tokens[f].slice(0, 4));
    const kind = column.value && i ? `number${shown(column.key) ? " shown" : ""}` : "";
    return element("div", {role: i ? "gridcell" : "rowheader", class: kind}, ...content);
  });
  const made = element("div", {role: "row", class: "row", id: `row-${f}`, "aria-rowindex": index + 2,
    "aria-selected": f === state.open}, ...cells);
  made.classList.toggle("open", f === state.open);
  made.classList.toggle("active", index === state.active);
  made.style.top = `${index * ROW}px`;
  made.addEventListener("click", () => { state.active = index; openFeature(f); });
  return made;
}

function drawRows() {
  const first = Math.max(Math.floor(scroller.scrollTop / ROW) - 8, 0);
  const last = Math.min(Math.ceil((scroller.scrollTop + scroller.clientHeight) / ROW) + 8, state.order.length);
  rows.replaceChildren(...Array.from({length: Math.max(last - first, 0)}, (_, i) => row(first + i)));
  const active = state.order[state.active];
  if (active !== undefined && byId(`row-${active}`)) list.setAttribute("aria-activedescendant", `row-${active}`);
  else list.removeAttribute("aria-activedescendant");
}

function activate(index) {
  if (!state.order.length) return;
  state.active = Math.min(Math.max(index, 0), state.order.length - 1);
  const top = state.active * ROW, height = scroller.clientHeight;
  if (top < scroller.scrollTop) scroller.scrollTop = top;
  else if (top + ROW > scroller.scrollTop + height) scroller.scrollTop = top + ROW - height;
  drawRows();
}

function sortBy(key, up = null) {
  const column = COLUMNS.find((c) => c.key === key);
  state.up = up ?? (state.sort === key ? !state.up : Boolean(column.up));
  state.sort = key;
  arrange();
}

function setUpList() {
  for (const [i, column] of COLUMNS.entries()) {
    const head = element("div", {role: "columnheader", class: column.value && i ? "number" : "", "data-key": column.key});
    if (column.value) {
      head.append(element("button", {type: "button", title: column.means, onclick: () => sortBy(column.key)}, column.name));
      byId("sort").append(element("option", {value: column.key}, column.name.replace("\u00ad", "")));
    } else head.append(column.name);
    byId("head").append(head);
  }
  list.setAttribute("aria-colcount", COLUMNS.length);
  byId("often-label").textContent = `only those on at least ${data.min_activations} times`;
  byId("sort").addEventListener("change", (event) => sortBy(event.target.value, Boolean(COLUMNS.find((c) => c.key === event.target.value).up)));
  byId("order").addEventListener("click", () => sortBy(state.sort));
  search.addEventListener("input", () => arrange());
  search.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "Enter") {
      event.preventDefault();
      list.focus();
    }
  });
  often.addEventListener("change", () => arrange());
  scroller.addEventListener("scroll", () => requestAnimationFrame(drawRows), {passive: true});
  new ResizeObserver(drawRows).observe(scroller);
  const page = () => Math.max(Math.floor(scroller.clientHeight / ROW) - 1, 1);
  const moves = {ArrowDown: () => 1, ArrowUp: () => -1, PageDown: page, PageUp: () => -page(), Home: () => -Infinity, End: () => Infinity};
  list.addEventListener("keydown", (event) => {
    if (event.target !== list) return;
    if (event.key in moves) activate(state.active + moves[event.key]());
    else if ((event.key === "Enter" || event.key === " ") && state.order.length) openFeature(state.order[state.active], true);
    else return;
    event.preventDefault();
  });
  arrange();
}
