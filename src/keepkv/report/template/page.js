// What is shown, and the sections on scores.
const D = JSON.parse(byId("data").textContent);
const C = Object.fromEntries(["task", "mode", "length", "m", "budget", ...D.columns].map((name, i) => [name, i]));
const CELLS = D.cells.map((row) => Object.fromEntries(Object.entries(C).map(([name, i]) => [name, row[i]])));
const FULL = D.methods.findIndex((method) => method.name === "full"), RANDOM = D.methods.findIndex((method) => method.name === "random");
const num = (v, digits = 3) => (v === null || v === undefined ? "–" : v.toFixed(digits));
const signed = (v) => (v === null || v === undefined ? "–" : (v > 0 ? "+" : v < 0 ? "−" : "±") + Math.abs(v).toFixed(3));
const range = (low, high, show = num) => (low === null || low === undefined ? "" : ` [${show(low)}, ${show(high)}]`);
const big = (v) => (v === null || v === undefined ? "–" : v === 0 ? "0" : v >= 100 ? Math.round(v).toLocaleString("en") : v.toPrecision(3));
const size = (v) => { let i = 0; while (v >= 1024 && i < 4) { v /= 1024; i++; } return `${v < 10 && i ? v.toFixed(1) : Math.round(v)} ${["B", "KiB", "MiB", "GiB", "TiB"][i]}`; };
const count = (n, what) => `${n.toLocaleString("en")} ${what}${n === 1 ? "" : "s"}`;
const listed = (names) => (names.length < 3 ? names.join(" and ") : `${names.slice(0, -1).join(", ")} and ${names.at(-1)}`);
const MODE = { agnostic: "query-agnostic", aware: "query-aware", decode: "decode" };

// Kept in the address, so that a view can be linked to. slots: which method has which colour, null where none has.
const state = { task: D.start.task, mode: D.start.mode, length: D.start.length, budget: D.start.budget, slots: [], heat: "score", leak: "leak", spans: null, token: null, question: 0 };
take(D.start.methods.map(indexOf));
function indexOf(name) { return D.methods.findIndex((method) => method.name === name); }
function take(methods) { state.slots = D.series.map((_, i) => methods.filter((m) => m >= 0 && !D.methods[m].base)[i] ?? null); }
function readHash() {
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
    if (name === "task" && D.tasks.includes(value)) state.task = value;
    if (name === "mode" && D.modes.some(([mode]) => mode === value)) state.mode = value;
    if (name === "length" && D.lengths.includes(Number(value))) state.length = Number(value);
    if (name === "budget" && D.budgets.slice(0, D.asked).includes(value)) state.budget = value;
    if (name === "heat" && ["score", "minus"].includes(value)) state.heat = value;
    if (name === "methods") take(value.split(" ").map(indexOf));
    if (name === "tokens" && indexOf(value) >= 0) state.token = indexOf(value);
  }
}
function writeHash() {
  const { task, mode, length, budget, heat } = state, methods = state.slots.filter((m) => m !== null).map((m) => D.methods[m].name).join(" ");
  const given = { task, mode, length, budget, heat, methods };
  if (state.token !== null) given.tokens = D.methods[state.token].name;
  history.replaceState(null, "", "#" + new URLSearchParams(given));
}
function set(change) { Object.assign(state, change); settle("task" in change); writeHash(); render(); }
// Not every task and budget is measured in every mode and length: what was chosen last stays, the rest goes where there is something.
function settle(taskStays) {
  if (!panel()) {
    const row = CELLS.find((cell) => (taskStays ? D.tasks[cell.task] === state.task : D.modes[cell.mode][0] === state.mode && D.lengths[cell.length] === state.length));
    if (row) Object.assign(state, taskStays ? { mode: D.modes[row.mode][0], length: D.lengths[row.length] } : { task: D.tasks[row.task] });
  }
  const measured = budgetsIn(panel());
  if (measured.length && !measured.includes(state.budget)) state.budget = measured[Math.floor((measured.length - 1) / 2)];
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
const onPaper = () => document.body.classList.contains("paper");
const where = () => `${state.task}, ${MODE[state.mode]}, ${state.length.toLocaleString("en")} tokens`;
const budgetsIn = (found) => { const held = new Set(found ? [...found.values()].filter((cell) => cell.m !== FULL).map((cell) => cell.budget) : []); return D.budgets.filter((_, b) => held.has(b)); };

// How a method is drawn: as a baseline, in the colour it was given, or in grey, as one of those drawn without one.
const lookOf = (m) => (D.methods[m].base ? D.baselines[D.methods[m].name] : state.slots.includes(m) ? D.series[state.slots.indexOf(m)] : null);
const drawn = (m) => lookOf(m) !== null;
const NAMES = D.methods.map((method) => method.name);
const swatch = (m) => (lookOf(m) ? badge(lookOf(m)) : make("span", { class: "badge" }));
const named = (m) => [swatch(m), make("span", {}, breakable(NAMES[m]))];
// Of methods that a chart has, the ten that it draws, and how: the chosen ones, then others in grey.
function looks(methods) {
  const known = methods.filter(drawn), rest = methods.filter((m) => !drawn(m)).slice(0, D.series.length + 3 - known.length);
  return new Map([...known.map((m) => [m, lookOf(m)]), ...rest.map((m, i) => [m, D.others[i % D.others.length]])]);
}
const key = (id, found) => put(id, [...found].map(([m, look]) => make("li", { "data-m": m, ...heats(m) }, badge(look, true), " ", breakable(NAMES[m]))));

function describe(cell) {
  return [cell.m === FULL ? "full cache" : `${NAMES[cell.m]} at ${D.budgets[cell.budget]}`, `score ${num(cell.score)}${range(cell.low, cell.high)}`,
    cell.m !== FULL && `minus full ${signed(cell.minus_full)}${range(cell.minus_full_low, cell.minus_full_high, signed)}`,
    `ratio ${num(cell.ratio)}${cell.bytes === null ? "" : `, ${size(cell.bytes)}`}`, cell.written_per_s !== null && `${big(cell.written_per_s)} tokens/s written`,
    cell.leaked !== null && `leaked ${num(cell.leaked)}`, `n = ${cell.n}${cell.failed ? `, ${cell.failed} failed` : ""}`];
}
// Half the widest 95 % interval of a share of n items: what an interval over a few items that agree does not say.
const unsure = (n) => D.z / (2 * Math.sqrt(n + D.z ** 2));
const fewItems = (cell) => cell && cell.n > 0 && cell.n < D.few;

// Shares, slots and bytes are different things: a chart for each, side by side.
function onAxes(host, labels, places, render) {
  const kinds = D.axes.map((title, kind) => ({ title, budgets: labels.filter((label) => places[label][0] === kind) })).filter((axis) => axis.budgets.length);
  const hosts = kinds.map((axis) => make("div", { style: `flex:${axis.budgets.length + 1} 1 0` }));
  host.classList.toggle("axes", kinds.length > 1);
  put(host, hosts);
  kinds.forEach(({ title, budgets }, i) => {
    const sizes = budgets.map((label) => places[label][1]), low = Math.min(...sizes), high = Math.max(...sizes);
    const ticks = budgets.map((text, b) => ({ at: high > low ? (sizes[b] - low) / (high - low) : 0.5, text: text.replace(/ slots$| of bytes$/, "") }));
    render(hosts[i], { title, budgets, xs: ticks, place: new Map(budgets.map((label, b) => [label, ticks[b].at])) });
  });
}
function scoreSeries(found, axis) {
  return D.measured.filter(drawn).map((m) => {
    const flat = m === FULL, own = flat ? [[at(found, m), 0.5]] : axis.budgets.map((label) => [at(found, m, D.budgets.indexOf(label)), axis.place.get(label)]);
    const points = own.filter(([cell]) => cell).map(([cell, x]) => ({ x, y: cell.score, low: cell.low, high: cell.high, tip: describe(cell) }));
    return { m, look: lookOf(m), name: NAMES[m], flat, points };
  });
}
const scoreAxis = [0, 0.25, 0.5, 0.75, 1].map((v) => ({ at: v, text: String(v) }));
function toggle(m) {
  const slots = [...state.slots], has = slots.indexOf(m), free = slots.indexOf(null);
  if (D.methods[m].base || (has < 0 && free < 0)) return;
  slots[has < 0 ? free : has] = has < 0 ? m : null;
  set({ slots });
}
const best = () => { const others = ranked(panel()).filter((m) => !D.methods[m].base); return D.series.map((_, i) => others[i] ?? null); };

const tabs = (name, given, shown, label = name) => make("span", { class: "tabs", role: "group", "aria-label": label },
  given.map(([value, text]) => make("button", { "aria-pressed": String(value === shown), onclick: () => set({ [name]: value }) }, text)));
function bar() {
  const select = (name, given, label = name, read = (value) => value) => make("label", {}, label, make("select", { "data-pick": name, onchange: (event) => set({ [name]: read(event.target.value) }) },
    given.map(([value, text]) => make("option", { value, selected: value === state[name] }, text))));
  const narrow = innerWidth <= 820, modes = D.modes.map(([mode]) => [mode, MODE[mode]]);
  const tasks = D.tasks.filter((task) => CELLS.some((cell) => D.tasks[cell.task] === task));
  const parts = [select("task", tasks.map((task) => [task, task]))];
  if (modes.length > 1) parts.push(narrow ? select("mode", modes) : tabs("mode", modes, state.mode));
  if (D.lengths.length > 1) parts.push(select("length", D.lengths.map((value) => [value, value.toLocaleString("en")]), "tokens", Number));
  parts.push(select("budget", budgetsIn(panel()).map((budget) => [budget, budget])));
  put("bar", parts, make("a", { href: "#chips", onclick: (event) => { event.preventDefault(); byId("chips").scrollIntoView({ block: "center" }); } }, "methods"));
}
function scores() {
  const found = panel(), few = found && [...found.values()].find(fewItems);
  byId("score-sub").textContent = `${where()}. ${D.modes.find(([mode]) => mode === state.mode)[1]} Bands are 95 % intervals over items.`
    + (few ? ` With ${count(few.n, "item")} a score is known to ± ${unsure(few.n).toFixed(1)} at worst: read smaller differences as chance.` : "");
  for (const table of document.querySelectorAll("table.summary")) table.hidden = table.dataset.mode !== state.mode || Number(table.dataset.length) !== state.length;
  if (!found) { put("score-chart", make("p", { class: "hint" }, "Not measured: choose another task, mode or length.")); put("rank"); return; }
  if (!budgetsIn(found).length) put("score-chart", make("p", { class: "hint" }, "Only the full cache was measured here."));
  else onAxes(byId("score-chart"), budgetsIn(found), D.places, (host, axis) => lines(host, { series: scoreSeries(found, axis), xs: axis.xs, ys: scoreAxis, domain: [0, 1], range: [0, 1], height: onPaper() ? 300 : 430, xLabel: axis.title, title: `Score against ${axis.title}: ${where()}` }));
  const full = at(found, FULL);
  rank(byId("rank"), ranked(found).map((m) => {
    const cell = at(found, m);
    return { m, look: lookOf(m), name: NAMES[m], value: cell.score, low: cell.low, high: cell.high, text: num(cell.score), tip: describe(cell), press: D.methods[m].base ? null : () => toggle(m) };
  }), full && full.score);
}
// The legend and the chooser: who is drawn, in which colour; who else there is.
function chips() {
  const free = state.slots.includes(null), quick = (text, slots) => make("button", { class: "quick", onclick: () => set({ slots }) }, text);
  const chosen = state.slots.filter((m) => m !== null), bases = D.measured.filter((m) => D.methods[m].base), rest = D.methods.map((_, m) => m).filter((m) => !drawn(m));
  put("chips", [...bases, ...chosen].map((m) => D.methods[m].base ? make("span", { class: "chip base", "data-m": m, ...heats(m) }, badge(lookOf(m), true), make("span", {}, breakable(NAMES[m])))
    : make("button", { class: "chip", "data-m": m, "aria-pressed": "true", title: "take off", onclick: () => toggle(m), ...heats(m) }, badge(lookOf(m), true), make("span", {}, breakable(NAMES[m])), make("span", { class: "off", "aria-hidden": "true" }, "×"))),
  quick(`best ${D.series.length}`, best()), quick("baselines only", D.series.map(() => null)));
  byId("others").hidden = !rest.length;
  byId("others-count").textContent = free ? `Draw others (${rest.length})` : `${rest.length} others: to draw one, take one of the ${D.series.length} off first`;
  put("others-chips", rest.map((m) => make("button", { class: "chip", "aria-pressed": "false", disabled: !free, onclick: () => toggle(m) }, make("span", {}, breakable(NAMES[m])))));
}
function multiples() {
  const shown = D.tasks.filter((task) => task !== D.tasks[0] && panel(task));
  byId("s-tasks").hidden = shown.length < 2;
  if (shown.length < 2) return;
  const hosts = shown.map((task) => {
    const host = make("div"), full = at(panel(task), FULL);
    return [task, host, make("div", { class: "small" }, make("h3", {}, make("button", { "aria-pressed": String(task === state.task), onclick: () => set({ task }) }, task), make("span", { class: "note" }, full ? `full ${num(full.score, 2)}` : "")), host)];
  });
  const several = new Set(budgetsIn(panel(shown[0])).map((label) => D.places[label][0])).size > 1;
  byId("multiples").classList.toggle("wide", shown.length < 5 || several);
  put("multiples", hosts.map(([, , node]) => node));
  key("tasks-key", new Map(D.measured.filter(drawn).map((m) => [m, lookOf(m)])));
  for (const [task, host] of hosts) onAxes(host, budgetsIn(panel(task)), D.places, (part, axis) => lines(part, { series: scoreSeries(panel(task), axis), xs: axis.xs, ys: [0, 0.5, 1].map((v) => ({ at: v, text: String(v) })), domain: [0, 1], range: [0, 1], height: 138, small: true, title: `Score against ${axis.title}: ${task}` }));
}
// Points that no other beats: none has a larger score with as few bytes, or as high a speed, or one that is the same but for SAME.
function front(points, smaller) {
  const sorted = [...points].sort((a, b) => (smaller ? a[0] - b[0] : b[0] - a[0]) || b[1] - a[1]), held = [];
  for (const [x, y] of sorted) {
    const rival = ([other, better]) => better > y && (smaller ? other <= x * (1 + D.same) : other >= x * (1 - D.same));
    if (!sorted.some(rival) && (!held.length || y > held.at(-1)[1])) held.push([x, y]);
  }
  return held;
}
function pareto(host, column, label, log, smaller) {
  const found = panel(), values = found ? [...found.values()].filter((cell) => cell[column] > 0 && cell.score !== null) : [];
  if (!values.length) { put(host, make("p", { class: "hint" }, `No ${label} here.`)); return; }
  const scaled = log ? Math.log10 : (v) => v, raw = values.map((cell) => scaled(cell[column]));
  const low = log ? Math.min(...raw) : 0, high = Math.max(...raw);
  const ticks = log ? [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1].filter((v) => scaled(v) >= low - 0.05 && scaled(v) <= high + 0.05) : nice(high);
  const point = (cell) => ({ m: cell.m, x: scaled(cell[column]), y: cell.score, low: cell.low, high: cell.high, tip: describe(cell) });
  const series = D.measured.filter(drawn).map((m) => ({ m, look: lookOf(m), name: NAMES[m], points: values.filter((cell) => cell.m === m).sort((a, b) => a[column] - b[column]).map(point) }));
  const steps = front(values.filter((cell) => cell.m !== RANDOM).map((cell) => [cell[column], cell.score]), smaller).map(([x, y]) => [scaled(x), y]);
  lines(byId(host), { series, dots: values.filter((cell) => !drawn(cell.m)).map(point), xs: ticks.map((v) => ({ at: scaled(v), text: log ? String(v) : v.toLocaleString("en") })), ys: scoreAxis, domain: [low, high], range: [0, 1], height: onPaper() ? 260 : 360, labels: false, bars: true, front: steps, xLabel: label, title: `Score against ${label}: ${where()}` });
}
function nice(high) {
  const raw = high / 5, unit = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 2.5, 5, 10].find((v) => v * unit >= raw) * unit;
  return Array.from({ length: Math.floor(high / step + 1e-9) + 1 }, (_, i) => Number((i * step).toPrecision(6)));
}
function lead() {
  const task = panel(D.start.task) ? D.start.task : state.task, found = panel(task), full = at(found, FULL);
  const order = ranked(found).filter((m) => m !== FULL && m !== RANDOM), first = order[0];
  if (!full || first === undefined) return;
  const cell = at(found, first), b = (text) => make("b", {}, text), around = (one) => (one.low === null ? "" : `\u00a0±\u00a0${((one.high - one.low) / 2).toFixed(2)}`);
  const spread = fewItems(cell) ? () => "" : around, near = order.slice(1).filter((m) => at(found, m).high !== null && cell.low !== null && at(found, m).high >= cell.low);
  const worse = worseThanRandom().filter((row) => row.method === first);
  put("lead", `On ${task}, ${MODE[state.mode]}, with ${state.length.toLocaleString("en")} tokens of context, the full cache scores `, b(num(full.score)), `${spread(full)}. At a budget of ${state.budget} the best of ${order.length} methods, `, make("b", {}, breakable(NAMES[first])), ", scores ", b(num(cell.score)),
    `${spread(cell)}${cell.ratio === null ? "" : ` with ${num(100 * cell.ratio, 1)} % of the bytes`}.`,
    fewItems(cell) ? [" ", b(`${count(cell.n, "item")}: ±\u00a0${unsure(cell.n).toFixed(1)}`), "."] : near.length ? ` ${count(near.length, "other")} ${near.length === 1 ? "is" : "are"} not clearly worse: the intervals meet.` : "",
    worse.length ? ` In fidelity, though, ${NAMES[first]} is further from the full cache than random drops (at ${listed(worse.map((row) => row.budget))}).` : "");
}
