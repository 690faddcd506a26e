const D = JSON.parse(byId("data").textContent);
const C = Object.fromEntries(["task", "mode", "length", "m", "budget", ...D.columns].map((name, i) => [name, i]));
const CELLS = D.cells.map((row) => Object.fromEntries(Object.entries(C).map(([name, i]) => [name, row[i]])));
const FULL = D.methods.findIndex((method) => method.name === "full");
const num = (v, digits = 3) => (v === null || v === undefined ? "–" : v.toFixed(digits));
const signed = (v) => (v === null || v === undefined ? "–" : (v > 0 ? "+" : v < 0 ? "−" : "±") + Math.abs(v).toFixed(3));
const range = (low, high, show = num) => (low === null || low === undefined ? "" : ` [${show(low)}, ${show(high)}]`);
const big = (v) => (v === null || v === undefined ? "–" : v === 0 ? "0" : v >= 100 ? Math.round(v).toLocaleString("en") : v.toPrecision(3));
const size = (v) => { let i = 0; while (v >= 1024 && i < 4) { v /= 1024; i++; } return `${v < 10 && i ? v.toFixed(1) : Math.round(v)} ${["B", "KiB", "MiB", "GiB", "TiB"][i]}`; };
const MODE = { agnostic: "query-agnostic", aware: "query-aware", decode: "decode" };

// What is shown: kept in the address, so that a view can be linked to.
const state = { task: D.start.task, mode: D.start.mode, length: D.start.length, budget: D.start.budget, methods: new Set(D.start.methods.map(indexOf)),
  heat: "score", leak: "leak", spans: null, token: null, question: 0, map: null };
function indexOf(name) { return D.methods.findIndex((method) => method.name === name); }
function readHash() {
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
    if (name === "task" && D.tasks.includes(value)) state.task = value;
    if (name === "mode" && D.modes.some(([mode]) => mode === value)) state.mode = value;
    if (name === "length" && D.lengths.includes(Number(value))) state.length = Number(value);
    if (name === "budget" && D.budgets.slice(0, D.asked).includes(value)) state.budget = value;
    if (name === "heat" && ["score", "minus"].includes(value)) state.heat = value;
    if (name === "methods") state.methods = new Set(value.split(" ").map(indexOf).filter((m) => m >= 0));
    if (name === "tokens" && indexOf(value) >= 0) state.token = indexOf(value);
  }
  D.methods.forEach((method, m) => method.base && state.methods.add(m));
}
function writeHash() {
  const { task, mode, length, budget, heat } = state, methods = [...state.methods].map((m) => D.methods[m].name).join(" ");
  const given = { task, mode, length, budget, heat, methods };
  if (state.token !== null) given.tokens = D.methods[state.token].name;
  history.replaceState(null, "", "#" + new URLSearchParams(given));
}
function set(change) { Object.assign(state, change); settle("task" in change); writeHash(); render(); }
// Not every task is measured in every mode and length: what was chosen last stays, the rest goes where there is something.
function settle(taskStays) {
  if (panel()) return;
  const row = CELLS.find((cell) => (taskStays ? D.tasks[cell.task] === state.task : D.modes[cell.mode][0] === state.mode && D.lengths[cell.length] === state.length));
  if (row) Object.assign(state, taskStays ? { mode: D.modes[row.mode][0], length: D.lengths[row.length] } : { task: D.tasks[row.task] });
}

// Every cell of a task, mode and length, by method and budget; the full cache has the same at every budget.
const index = new Map();
for (const cell of CELLS) {
  const key = [cell.task, cell.mode, cell.length].join();
  if (!index.has(key)) index.set(key, new Map());
  index.get(key).set(`${cell.m},${cell.m === FULL ? "full" : cell.budget}`, cell);
}
const panel = (task = state.task) => index.get([D.tasks.indexOf(task), D.modes.findIndex(([mode]) => mode === state.mode), D.lengths.indexOf(state.length)].join());
const at = (found, m, budget = D.budgets.indexOf(state.budget)) => (found && found.get(`${m},${m === FULL ? "full" : budget}`)) || null;
const score = (cell) => (cell && cell.score !== null ? cell.score : -1);
const ranked = (found) => D.measured.filter((m) => at(found, m)).sort((a, b) => score(at(found, b)) - score(at(found, a)));
const where = () => `${state.task}, ${MODE[state.mode]}, ${state.length.toLocaleString("en")} tokens`;

function describe(cell) {
  const name = D.methods[cell.m].name;
  return [cell.m === FULL ? "full cache" : `${name} at ${D.budgets[cell.budget]}`, `score ${num(cell.score)}${range(cell.low, cell.high)}`,
    cell.m !== FULL && `minus full ${signed(cell.minus_full)}${range(cell.minus_full_low, cell.minus_full_high, signed)}`,
    `ratio ${num(cell.ratio)}${cell.bytes === null ? "" : `, ${size(cell.bytes)}`}`, cell.written_per_s !== null && `${big(cell.written_per_s)} tokens/s written`,
    cell.leaked !== null && `leaked ${num(cell.leaked)}`, `n = ${cell.n}${cell.failed ? `, ${cell.failed} failed` : ""}`];
}
const faded = (m) => D.measured.includes(m) && !state.methods.has(m);
function scoreSeries(found, small) {
  return D.measured.map((m) => {
    const flat = m === FULL;
    const own = flat ? [[at(found, m), 0.5]] : D.positions.map((x, b) => [at(found, m, b), x]);
    const points = own.filter(([cell]) => cell).map(([cell, x]) => ({ x, y: cell.score, low: cell.low, high: cell.high, tip: describe(cell) }));
    return { m, method: D.methods[m], quiet: !state.methods.has(m), flat, points };
  });
}
const scoreAxis = [0, 0.25, 0.5, 0.75, 1].map((v) => ({ at: v, text: String(v) }));
const budgetAxis = () => D.positions.map((v, i) => ({ at: v, text: D.budgets[i] }));
const toggle = (m) => {
  if (D.methods[m].base) return;
  const methods = new Set(state.methods);
  if (!methods.delete(m)) methods.add(m);
  set({ methods });
};

function bar() {
  const tabs = (name, given, shown) => make("span", { class: "tabs", role: "group", "aria-label": name },
    given.map(([value, text]) => make("button", { "aria-pressed": String(value === shown), onclick: () => set({ [name]: value }) }, text)));
  const select = (name, given) => make("label", {}, name, make("select", { "data-pick": name, onchange: (event) => set({ [name]: event.target.value }) },
    given.map((value) => make("option", { value, selected: value === state[name] }, value))));
  const held = (task) => CELLS.some((cell) => D.tasks[cell.task] === task);
  const parts = [select("task", D.tasks.filter(held))];
  if (D.modes.length > 1) parts.push(tabs("mode", D.modes.map(([mode]) => [mode, MODE[mode]]), state.mode));
  if (D.lengths.length > 4) parts.push(make("label", {}, "tokens", make("select", { onchange: (event) => set({ length: Number(event.target.value) }) },
    D.lengths.map((value) => make("option", { value, selected: value === state.length }, value.toLocaleString("en"))))));
  else if (D.lengths.length > 1) parts.push(tabs("length", D.lengths.map((value) => [value, `${value.toLocaleString("en")} tokens`]), state.length));
  parts.push(select("budget", D.budgets.slice(0, D.asked)));
  put("bar", parts);
}
function scores() {
  const found = panel();
  byId("score-sub").textContent = `${where()}. ${D.modes.find(([mode]) => mode === state.mode)[1]} Bands are 95 % intervals.`;
  for (const table of document.querySelectorAll("table.summary")) table.hidden = table.dataset.mode !== state.mode || Number(table.dataset.length) !== state.length;
  if (!found) { put("score-chart", make("p", { class: "hint" }, "Not measured: choose another task, mode or length.")); put("rank"); return; }
  lines(byId("score-chart"), { series: scoreSeries(found), xs: budgetAxis(), ys: scoreAxis, domain: [0, 1], range: [0, 1], height: 430, xLabel: "budget", title: `Score against budget: ${where()}` });
  const order = ranked(found), full = at(found, FULL);
  rank(byId("rank"), order.map((m) => {
    const cell = at(found, m);
    return { m, method: D.methods[m], value: cell.score, low: cell.low, high: cell.high, text: num(cell.score), tip: describe(cell), quiet: !state.methods.has(m), onclick: () => toggle(m) };
  }), full && full.score);
}
function chips() {
  const order = D.measured, quick = (text, methods) => make("button", { class: "quick", onclick: () => set({ methods: new Set([...methods, ...order.filter((m) => D.methods[m].base)]) }) }, text);
  const others = ranked(panel()).filter((m) => !D.methods[m].base);
  put("chips", order.map((m) => {
    const method = D.methods[m];
    return make("button", { class: "chip", "data-m": m, "aria-pressed": String(state.methods.has(m)), style: ink(method), title: method.base ? "a baseline, always shown" : "show or fade",
      onclick: () => toggle(m), onpointerenter: () => hot(m), onpointerleave: () => hot(null) },
      draw("svg", { viewBox: "0 0 22 8", "aria-hidden": "true" }, draw("line", { x1: 0, x2: 22, y1: 4, y2: 4, stroke: "var(--c)", "stroke-width": 2.6, "stroke-dasharray": method.dash })), method.name);
  }), quick("best six", others.slice(0, 6)), quick("all", order), quick("baselines only", []));
}
function multiples() {
  const shown = D.tasks.filter((task) => task !== D.tasks[0] && panel(task));
  byId("s-tasks").hidden = shown.length < 2;
  if (shown.length < 2) return;
  const hosts = shown.map((task) => {
    const host = make("div"), full = at(panel(task), FULL);
    return [task, host, make("button", { class: "small", "aria-pressed": String(task === state.task), onclick: () => set({ task }) },
      make("h3", {}, task, make("span", { class: "note" }, full ? `full ${num(full.score, 2)}` : "")), host)];
  });
  byId("multiples").classList.toggle("wide", shown.length < 5);
  put("multiples", hosts.map(([, , node]) => node));
  for (const [task, host] of hosts) lines(host, { series: scoreSeries(panel(task), true), xs: budgetAxis(), ys: [0, 0.5, 1].map((v) => ({ at: v, text: String(v) })), domain: [0, 1], range: [0, 1], height: 138, small: true, title: `Score against budget: ${task}` });
}
function pareto(host, column, label, log, smaller) {
  const found = panel(), values = found ? [...found.values()].filter((cell) => cell[column] > 0 && cell.score !== null) : [];
  if (!values.length) { put(host, make("p", { class: "hint" }, `No ${label} here.`)); return; }
  const scale = log ? Math.log10 : (v) => v, raw = values.map((cell) => scale(cell[column]));
  const low = log ? Math.min(...raw) : 0, high = Math.max(...raw);
  const ticks = log ? [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1].filter((v) => scale(v) >= low - 0.05 && scale(v) <= high + 0.05) : nice(high);
  const series = D.measured.map((m) => ({ m, method: D.methods[m], quiet: !state.methods.has(m),
    points: values.filter((cell) => cell.m === m).sort((a, b) => a.budget - b.budget).map((cell) => ({ x: scale(cell[column]), y: cell.score, low: cell.low, high: cell.high, tip: describe(cell) })) }));
  const sorted = values.map((cell) => [scale(cell[column]), cell.score]).sort((a, b) => (smaller ? a[0] - b[0] : b[0] - a[0]) || b[1] - a[1]);
  const front = sorted.filter((p, i) => sorted.slice(0, i).every((q) => q[1] < p[1]));
  lines(byId(host), { series, xs: ticks.map((v) => ({ at: scale(v), text: log ? String(v) : v.toLocaleString("en") })), ys: scoreAxis, domain: [low, high], range: [0, 1], height: 360, labels: smaller, bars: true, front, xLabel: label, title: `Score against ${label}: ${where()}` });
}
function nice(high) {
  const raw = high / 5, unit = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 2.5, 5, 10].find((v) => v * unit >= raw) * unit;
  return Array.from({ length: Math.floor(high / step + 1e-9) + 1 }, (_, i) => Number((i * step).toPrecision(6)));
}
function heat() {
  const tasks = D.tasks.filter((task) => panel(task)), order = ranked(panel(tasks[0])), rest = D.measured.filter((m) => !order.includes(m) && tasks.some((task) => at(panel(task), m)));
  const minus = state.heat === "minus";
  const button = (value, text) => make("button", { "aria-pressed": String(state.heat === value), onclick: () => set({ heat: value }) }, text);
  put("heat-sub", `Budget ${state.budget}, ${MODE[state.mode]}, ${state.length.toLocaleString("en")} tokens; best first. `, make("span", { class: "tabs" }, button("score", "score"), button("minus", "difference from full")),
    minus ? " A framed cell differs by more than its interval." : "");
  const cell = (task, m) => {
    const one = at(panel(task), m), value = one && (minus ? one.minus_full : one.score);
    if (value === null || value === undefined) return make("td", { class: "none" }, "–");
    const v = minus ? Math.min(1, Math.abs(value) * 1.25) : value, to = minus && value < 0 ? "var(--bad)" : minus ? "var(--good)" : "var(--heat)";
    const sure = minus && one.minus_full_low !== null && (one.minus_full_high < 0 || one.minus_full_low > 0);
    return make("td", { class: (v > 0.55 ? "deep " : "") + (sure ? "sure " : "") + (task === D.tasks[0] ? "whole" : ""), style: `--v:${(v * 0.92).toFixed(3)};--to:${to}`, ...tipped(() => { const [head, ...lines] = describe(one); return [`${task}: ${head}`, ...lines]; }) },
      minus ? (Math.abs(value) < 0.005 ? "0" : (value > 0 ? "+" : "−") + Math.abs(value).toFixed(2).replace(/^0/, "")) : value.toFixed(2).replace(/^0/, ""));
  };
  put("heat", make("table", { class: "heat" }, make("thead", {}, make("tr", {}, make("th"), tasks.map((task) => make("th", { scope: "col" }, make("span", {}, task))))),
    make("tbody", {}, [...order, ...rest].map((m) => make("tr", { class: "row", "data-m": m }, make("th", { scope: "row", style: ink(D.methods[m]) }, make("i", { class: "swatch" }), D.methods[m].name), tasks.map((task) => cell(task, m)))))));
}
const shownMethods = (methods) => ranked(panel()).concat(D.measured).filter((m, i, all) => all.indexOf(m) === i && state.methods.has(m) && methods.has(m));
const titled = (m, note, ...kids) => make("div", { "data-m": m }, make("h3", { style: ink(D.methods[m]) }, make("i", { class: "swatch" }), D.methods[m].name, " ", make("span", { class: "note" }, note)), ...kids);

function needle() {
  const mode = D.modes.findIndex(([one]) => one === state.mode), budget = D.budgets.indexOf(state.budget), held = D.needles.filter((row) => row[1] === mode);
  byId("s-needle").hidden = !D.needles.length;
  const own = held.filter((row) => D.tasks[row[0]] === state.task), task = own.length ? state.task : held.length ? D.tasks[held[0][0]] : null;
  const rows = held.filter((row) => D.tasks[row[0]] === task && (row[2] === FULL || row[3] === budget));
  byId("needle-sub").textContent = task ? `${task}, ${MODE[state.mode]}, budget ${state.budget}: score by where the needle lies (top: start of the context) and how long the context is. Dark is found.` : "Not measured in this mode.";
  const depths = [...new Set(rows.map((row) => row[4]))].sort((a, b) => a - b), lengths = [...new Set(rows.map((row) => row[5]))].sort((a, b) => a - b);
  const found = new Map(rows.map((row) => [[row[2], row[4], row[5]].join(), row]));
  byId("needle").classList.toggle("slim", lengths.length < 4);
  put("needle", shownMethods(new Set(rows.map((row) => row[2]))).map((m) => {
    const mine = rows.filter((row) => row[2] === m), mean = mine.reduce((sum, row) => sum + row[6] * row[7], 0) / mine.reduce((sum, row) => sum + row[7], 0);
    return titled(m, num(mean, 2), cells(depths.map((d) => `${Math.round(100 * d)} %`), lengths.map((v) => v.toLocaleString("en")), (r, c) => {
      const row = found.get([m, depths[r], lengths[c]].join());
      return row && { v: row[6], tip: [D.methods[m].name, `depth ${Math.round(100 * depths[r])} %, ${lengths[c].toLocaleString("en")} tokens`, `score ${num(row[6])}, n = ${row[7]}`] };
    }, `Score by depth and length: ${D.methods[m].name}`));
  }));
}
// Maps are of single tasks: with all tasks chosen, of the first that has one.
function mapsHere() {
  const rows = D.maps.rows.filter((row) => row[1] === state.mode && row[2] === state.length);
  const task = rows.some((row) => row[0] === state.task) ? state.task : rows.length ? rows[0][0] : null;
  return new Map(rows.filter((row) => row[0] === task && (row[3] === FULL || row[4] === state.budget)).map((row) => [row[3], row]));
}
const leftOut = () => (D.maps_left_out ? ` ${D.maps_left_out.toLocaleString("en")} maps are left out to keep this page small: see maps.jsonl.` : "");
function budgetMap(rows) {
  byId("s-map").hidden = !D.maps.rows.length;
  const first = [...rows.values()][0];
  byId("map-sub").textContent = first ? `${first[0]}, one item, budget ${state.budget}: slots kept in each layer (rows) and KV head (columns); darker is more, on one scale for all methods but the full cache.${leftOut()}` : `No map of this choice.${leftOut()}`;
  const most = Math.max(1, ...[...rows.values()].filter((row) => row[3] !== FULL).flatMap((row) => row[6].flat()));
  put("map", shownMethods(new Set(rows.keys())).filter((m) => m !== FULL).map((m) => {
    const kept = rows.get(m)[6], heads = Math.max(...kept.map((layer) => layer.length)), flat = kept.flat(), mean = flat.reduce((a, b) => a + b, 0) / flat.length;
    return titled(m, `${big(mean)} per head`, cells(kept.map((_, i) => String(i)), Array.from({ length: heads }, (_, i) => String(i)), (r, c) => kept[r][c] === undefined ? null :
      { v: kept[r][c] / most, tip: [D.methods[m].name, `layer ${r}, KV head ${c}`, `${big(kept[r][c])} slots`] }, `Slots kept by layer and head: ${D.methods[m].name}`));
  }));
}
function answersIn(text, answer) {
  const whole = text.tokens.join(""), tries = [answer.trim(), answer.trim().replace(/[.!?,;]+$/, "")].filter(Boolean), hits = [];
  const wanted = tries.find((one) => whole.includes(one));
  if (!wanted) return hits;
  for (let from = whole.indexOf(wanted); from >= 0; from = whole.indexOf(wanted, from + wanted.length)) hits.push([from, from + wanted.length]);
  return hits;
}
function tokens(rows) {
  byId("s-text").hidden = !D.maps.rows.length;
  const order = shownMethods(new Set(rows.keys())).filter((m) => m !== FULL);
  if (!order.length) { put("strips"); put("ask"); put("text"); byId("text-sub").textContent = `No map of this choice.${leftOut()}`; return; }
  const m = order.includes(state.token) ? state.token : order[0], row = rows.get(m), text = D.maps.texts[row[5]];
  byId("text-sub").textContent = `${row[0]}, budget ${state.budget}. Each strip is the text from start to end: the stronger a token's colour, the more layers and heads still hold it (its root, so that little shows). Choose a method to read what it kept, and a question to find its answer.`;
  const survival = (one) => Array.from(one[7], (c) => D.maps.steps.indexOf(c) / 63);
  put("strips", order.flatMap((one) => {
    const values = survival(rows.get(one)), canvas = make("canvas", { width: values.length, height: 1, onclick: () => set({ token: one }), "aria-hidden": "true" });
    const keep = getComputedStyle(document.body).getPropertyValue("--accent").trim(), pen = canvas.getContext("2d");
    values.forEach((v, i) => { pen.globalAlpha = Math.sqrt(v); pen.fillStyle = keep; pen.fillRect(i, 0, 1, 1); });
    return [make("button", { "data-m": one, "aria-pressed": String(one === m), onclick: () => set({ token: one }) }, D.methods[one].name), canvas,
      make("span", { class: "n" }, `${Math.round((100 * values.reduce((a, b) => a + b, 0)) / values.length)} %`)];
  }));
  const hits = text.answers.map((answer) => answersIn(text, answer)), chosen = Math.min(state.question, hits.length - 1);
  put("ask", text.questions.map((question, i) => make("button", { "aria-pressed": String(i === chosen), class: hits[i] && hits[i].length ? null : "miss",
    onclick: () => { state.question = i; tokens(rows); const found = document.querySelector(".text .here"); if (found) byId("text").scrollTop = found.offsetTop - byId("text").offsetTop - 80; } },
    `${question.trim().slice(-90)} → ${(text.answers[i] || "").trim()}${hits[i] && hits[i].length ? "" : " (not in the text word for word)"}`)));
  const all = hits.flat(), here = hits[chosen] || [], inside = (spans, from, to) => spans.some(([a, b]) => from < b && to > a);
  let place = 0;
  put("text", survival(row).map((v, i) => {
    const from = place, to = (place += text.tokens[i].length);
    const marks = (inside(all, from, to) ? "answer" : "") + (inside(here, from, to) ? " here" : "");
    return make("span", { style: `--v:${Math.sqrt(v).toFixed(2)}`, class: marks || null, title: `held by ${Math.round(100 * v)} % of layers and heads` }, text.tokens[i]);
  }));
}
function leakage() {
  byId("s-leak").hidden = !D.leakage.length;
  if (!D.leakage.length) return;
  const distinct = (name) => [...new Set(D.leakage.map((row) => row[name]))], spans = distinct("spans");
  const kind = spans.includes(state.spans) ? state.spans : spans[0], what = state.leak;
  const choice = (name, given, shown) => make("span", { class: "tabs" }, given.map(([value, text]) => make("button", { "aria-pressed": String(value === shown), onclick: () => set({ [name]: value }) }, text)));
  put("leak-pick", choice("leak", [["leak", "leaks"], ["directive", "follows the directive"]], what), make("label", {}, "spans", choice("spans", spans.map((v) => [v, v]), kind)));
  const hosts = distinct("order").map((order) => [order, make("div")]);
  put("leak", hosts.map(([order, host]) => make("div", { class: "small" }, make("h3", {}, order), host)));
  for (const [order, host] of hosts) {
    const series = distinct("method").map((m) => {
      const rows = D.leakage.filter((row) => row.method === m && row.order === order && row.spans === kind).sort((a, b) => a.removed - b.removed);
      const peak = rows.reduce((best, row) => (best && (best.leak || 0) >= (row.leak || 0) ? best : row), null);
      return { m, method: D.methods[m], quiet: faded(m), points: rows.map((row) => ({ x: row.removed, y: row[what], low: row[what + "_low"], high: row[what + "_high"], ring: what === "leak" && row === peak && row.leak > 0,
        tip: [`${D.methods[m].name}, ${kind}`, `${Math.round(100 * row.removed)} % removed`, `leaks ${num(row.leak)}${range(row.leak_low, row.leak_high)}`, `follows ${num(row.directive)}${range(row.directive_low, row.directive_high)}`,
          row.keep_defence !== null && `kept of the defence ${num(row.keep_defence, 2)}, of the directive ${num(row.keep_directive, 2)}`, `n = ${row.n}`] })) };
    });
    lines(host, { series, xs: [0, 0.25, 0.5, 0.75, 1].map((v) => ({ at: v, text: `${100 * v} %` })), ys: scoreAxis, domain: [0, 1], range: [0, 1], height: 260, labels: false, xLabel: "removed", yLabel: what === "leak" ? "leaks" : "follows", title: `${what} against what was removed: ${order}` });
  }
  const peaks = D.peaks.map((i) => D.leakage[i]).map((row) => ({ ...row, m: row.method }));
  sortable("leak-table", peaks, [methodColumn, word("order"), word("spans"), { name: "peak leakage", value: (r) => r.leak, show: (r) => [num(r.leak), make("small", {}, range(r.leak_low, r.leak_high))] },
    { name: "removed there", value: (r) => r.removed, show: (r) => `${Math.round(100 * r.removed)} %` }, { name: "follows there", value: (r) => r.directive, show: (r) => num(r.directive) }, { name: "n", value: (r) => r.n, show: (r) => String(r.n) }], 3, 12);
}
const methodColumn = { name: "method", word: true, value: (row) => D.methods[row.m].name, show: (row) => [make("i", { class: "swatch", style: ink(D.methods[row.m]) }), D.methods[row.m].name] };
const word = (name, show = (row) => row[name]) => ({ name, word: true, value: show, show });

function fidelity() {
  byId("s-fidelity").hidden = !D.fidelity.length;
  if (!D.fidelity.length) return;
  const labels = [...new Set(D.fidelity.filter((row) => row.method !== FULL).map((row) => row.budget))], x = (row) => labels.length < 2 ? 0.5 : labels.indexOf(row.budget) / (labels.length - 1);
  const high = Math.max(1e-6, ...D.fidelity.map((row) => (row.kl && (row.kl[2] ?? row.kl[0])) || 0));
  const series = [...new Set(D.fidelity.map((row) => row.method))].map((m) => ({ m, method: D.methods[m], quiet: faded(m), flat: m === FULL, points: D.fidelity.filter((row) => row.method === m && row.kl).map((row) => ({ x: x(row), y: row.kl[0], low: row.kl[1], high: row.kl[2],
    tip: [`${D.methods[m].name} at ${row.budget}`, `KL ${num(row.kl[0])}${range(row.kl[1], row.kl[2])} nats`, `ratio ${num(row.ratio)}`, `${row.segments} segments`] })) }));
  lines(byId("fidelity-chart"), { series, xs: labels.map((text, i) => ({ at: labels.length < 2 ? 0.5 : i / (labels.length - 1), text })), ys: nice(high).map((v) => ({ at: v, text: String(v) })), domain: [0, 1], range: [0, high], height: 320, xLabel: "budget", yLabel: "KL", title: "KL divergence against budget" });
  const one = (name, title, digits = 3) => ({ name: title, value: (row) => row[name] && row[name][0], show: (row) => row[name] && num(row[name][0], digits) });
  sortable("fidelity-table", D.fidelity.map((row) => ({ ...row, m: row.method })), [methodColumn, word("budget"), { name: "ratio", value: (r) => r.ratio, show: (r) => num(r.ratio) }, one("kl", "KL"), one("top1", "top-1"), one("output_error", "error"), one("prefix", "prefix", 1), one("loyalty", "loyalty", 2)], 3, 14);
}
function lost() {
  const failed = D.failures.reduce((sum, row) => sum + row[2], 0), worse = CELLS.filter((cell) => cell.task !== 0 && D.methods[cell.m].name !== "random" && cell.minus_full_high !== null && cell.minus_full_high < 0);
  const measured = CELLS.filter((cell) => cell.task !== 0 && cell.m !== FULL).length;
  byId("lost-sub").textContent = `${failed ? `${failed.toLocaleString("en")} items failed; they count, as 0 in scores over all tasks.` : "No item failed."} ${worse.length.toLocaleString("en")} of ${measured.toLocaleString("en")} compressed cells lie below the full cache by more than their interval (random not counted).`;
  if (D.failures.length) sortable("failures", D.failures.map(([name, error, n, tasks]) => ({ m: indexOf(name), error, n, tasks: tasks.join(", ") })), [methodColumn, { name: "items", value: (r) => r.n, show: (r) => String(r.n) }, { ...word("error"), wrap: true }, { ...word("tasks"), wrap: true }], 1, 8);
  sortable("lost", worse, [methodColumn, word("task", (r) => D.tasks[r.task]), word("budget", (r) => D.budgets[r.budget]), word("mode", (r) => MODE[D.modes[r.mode][0]]), { name: "tokens", value: (r) => r.length, show: (r) => D.lengths[r.length].toLocaleString("en") },
    { name: "below full", value: (r) => -r.minus_full, show: (r) => [signed(r.minus_full), make("small", {}, range(r.minus_full_low, r.minus_full_high, signed))] }, { name: "score", value: (r) => r.score, show: (r) => num(r.score) }], 5, 10);
}
function everything() {
  const mode = D.modes.findIndex(([one]) => one === state.mode), length = D.lengths.indexOf(state.length), task = D.tasks.indexOf(state.task);
  const rows = CELLS.filter((cell) => cell.mode === mode && cell.length === length && (task === 0 || cell.task === task));
  byId("table-sub").textContent = `${where()}: ${rows.length.toLocaleString("en")} of ${CELLS.length.toLocaleString("en")} cells. Press the name of a column to sort. Those of single tasks are in cells.csv.`;
  const plain = (name, title, show = num) => ({ name: title, value: (row) => row[name], show: (row) => show(row[name]) });
  sortable("table", rows, [methodColumn, word("task", (r) => D.tasks[r.task]), { name: "budget", value: (r) => (r.m === FULL ? 1e9 : r.budget), show: (r) => D.budgets[r.budget] },
    { name: "score", value: (r) => r.score, show: (r) => [num(r.score), make("small", {}, range(r.low, r.high, (v) => num(v, 2)))] }, { name: "− full", value: (r) => r.minus_full, show: (r) => [signed(r.minus_full), make("small", {}, range(r.minus_full_low, r.minus_full_high, (v) => signed(v).slice(0, 5)))] },
    plain("ratio", "ratio"), plain("bytes", "bytes", (v) => (v === null ? "–" : size(v))), plain("peak_bytes", "peak", (v) => (v === null ? "–" : size(v))), plain("read_per_s", "read/s", big), plain("written_per_s", "written/s", big), plain("leaked", "leaked"), plain("n", "n", String), plain("failed", "failed", String)], 3, 60);
}
function lead() {
  const task = panel(D.start.task) ? D.start.task : state.task, found = panel(task), full = at(found, FULL);
  const best = ranked(found).filter((m) => m !== FULL)[0];
  if (!full || best === undefined) return;
  const cell = at(found, best), b = (text) => make("b", {}, text);
  put("lead", `On ${task}, ${MODE[state.mode]}, with ${state.length.toLocaleString("en")} tokens of context, the full cache scores `, b(num(full.score)), `. At a budget of ${state.budget} the best of ${D.measured.length - 1} methods, `, b(D.methods[best].name), ", scores ", b(num(cell.score)),
    cell.ratio === null ? "." : ` with ${num(100 * cell.ratio, 1)} % of the bytes.`);
}
function render() {
  hideTip(); bar(); lead(); scores(); chips(); multiples();
  pareto("pareto-bytes", "ratio", "ratio: bytes held / bytes of the full cache", true, true);
  pareto("pareto-speed", "written_per_s", "tokens written per second", false, false);
  heat(); needle();
  const rows = mapsHere();
  budgetMap(rows); tokens(rows); leakage(); fidelity(); lost(); everything();
  document.body.dataset.ready = "yes";
}
readHash();
settle(true);
render();
addEventListener("hashchange", () => { readHash(); settle(true); render(); });
let wait = 0, last = innerWidth;
addEventListener("resize", () => { clearTimeout(wait); wait = setTimeout(() => { if (innerWidth !== last) { last = innerWidth; render(); } }, 120); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", render);
