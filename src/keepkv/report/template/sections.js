// The sections below the scores.
function heat() {
  const tasks = D.tasks.filter((task) => panel(task)), order = ranked(panel(tasks[0])), rest = D.measured.filter((m) => !order.includes(m) && tasks.some((task) => at(panel(task), m)));
  const minus = state.heat === "minus";
  byId("heat-sub").textContent = `Budget ${state.budget}, ${MODE[state.mode]}, ${state.length.toLocaleString("en")} tokens; best first.${minus ? " A framed cell differs by more than its interval." : ""}`;
  put("heat-pick", tabs("heat", [["score", "score"], ["minus", "difference from full"]], state.heat, "what the cells show"),
    minus ? scale("difference", ["−0.8", "0", "+0.8"], "split") : scale("score", ["0", "1"], "pale"));
  const cell = (task, m) => {
    const one = at(panel(task), m), value = one && (minus ? one.minus_full : one.score);
    if (value === null || value === undefined) return make("td", { class: "none" }, "–");
    const v = minus ? Math.min(1, Math.abs(value) * 1.25) : value, to = minus && value < 0 ? "var(--pale-bad)" : "var(--pale)";
    const sure = minus && one.minus_full_low !== null && (one.minus_full_high < 0 || one.minus_full_low > 0);
    return make("td", { class: (sure ? "sure " : "") + (task === D.tasks[0] ? "whole" : ""), style: `--v:${v.toFixed(3)};--to:${to}`, ...tipped(() => { const [head, ...lines] = describe(one); return [`${task}: ${head}`, ...lines]; }) },
      minus ? (Math.abs(value) < 0.005 ? "0" : (value > 0 ? "+" : "−") + Math.abs(value).toFixed(2).replace(/^0/, "")) : value.toFixed(2).replace(/^0/, ""));
  };
  put("heat", make("table", { class: "heat" }, make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "method"), tasks.map((task) => make("th", { scope: "col" }, make("span", {}, task))))),
    make("tbody", {}, [...order, ...rest].map((m) => make("tr", { class: "row", "data-m": m }, make("th", { scope: "row" }, named(m)), tasks.map((task) => cell(task, m)))))));
}
const shownMethods = (methods) => ranked(panel()).concat(D.measured).filter((m, i, all) => all.indexOf(m) === i && drawn(m) && methods.has(m));
const titled = (m, note, ...kids) => make("div", { "data-m": m }, make("h3", {}, named(m), make("span", { class: "note" }, note)), ...kids);

function needle() {
  const mode = D.modes.findIndex(([one]) => one === state.mode), budget = D.budgets.indexOf(state.budget), held = D.needles.filter((row) => row[1] === mode);
  byId("s-needle").hidden = !D.needles.length;
  const own = held.filter((row) => D.tasks[row[0]] === state.task), task = own.length ? state.task : held.length ? D.tasks[held[0][0]] : null;
  const rows = held.filter((row) => D.tasks[row[0]] === task && (row[2] === FULL || row[3] === budget));
  byId("needle-sub").textContent = task ? `${task}, ${MODE[state.mode]}, budget ${state.budget}: score by where the needle lies (0 %: start of the context) and how long the context is.` : "Not measured in this mode.";
  put("needle-scale", task ? scale("score", ["0: lost", "1: found"], "full") : []);
  const depths = [...new Set(rows.map((row) => row[4]))].sort((a, b) => a - b), lengths = [...new Set(rows.map((row) => row[5]))].sort((a, b) => a - b);
  const found = new Map(rows.map((row) => [[row[2], row[4], row[5]].join(), row]));
  put("needle", shownMethods(new Set(rows.map((row) => row[2]))).map((m) => {
    const mine = rows.filter((row) => row[2] === m), mean = mine.reduce((sum, row) => sum + row[6] * row[7], 0) / mine.reduce((sum, row) => sum + row[7], 0);
    return titled(m, `mean ${num(mean, 2)}`, cells(depths.map((d) => `${Math.round(100 * d)} %`), lengths.map((v) => v.toLocaleString("en")), (r, c) => {
      const row = found.get([m, depths[r], lengths[c]].join());
      return row && { v: row[6], tip: [NAMES[m], `depth ${Math.round(100 * depths[r])} %, ${lengths[c].toLocaleString("en")} tokens`, `score ${num(row[6])}, n = ${row[7]}`] };
    }, { down: "depth", across: "tokens of context", title: `Score by depth and length: ${NAMES[m]}` }));
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
  byId("map-sub").textContent = first ? `${first[0]}, one item, budget ${state.budget}: slots kept in each layer and KV head, on one scale for all methods but the full cache.${leftOut()}` : `No map of this choice.${leftOut()}`;
  const most = Math.max(1, ...[...rows.values()].filter((row) => row[3] !== FULL).flatMap((row) => row[6].flat()));
  put("map-scale", first ? scale("slots", ["0", big(most)], "full") : []);
  put("map", shownMethods(new Set(rows.keys())).filter((m) => m !== FULL).map((m) => {
    const kept = rows.get(m)[6], heads = Math.max(...kept.map((layer) => layer.length)), flat = kept.flat(), mean = flat.reduce((a, b) => a + b, 0) / flat.length;
    return titled(m, `${big(mean)} per head`, cells(kept.map((_, i) => String(i)), Array.from({ length: heads }, (_, i) => String(i)), (r, c) => kept[r][c] === undefined ? null :
      { v: kept[r][c] / most, tip: [NAMES[m], `layer ${r}, KV head ${c}`, `${big(kept[r][c])} slots`] }, { down: "layer", across: "KV head", title: `Slots kept by layer and head: ${NAMES[m]}` }));
  }));
}
function answersIn(text, answer) {
  const whole = text.tokens.join(""), tries = [answer.trim(), answer.trim().replace(/[.!?,;]+$/, "")].filter(Boolean), hits = [];
  const wanted = tries.find((one) => whole.includes(one));
  if (!wanted) return hits;
  for (let from = whole.indexOf(wanted); from >= 0; from = whole.indexOf(wanted, from + wanted.length)) hits.push([from, from + wanted.length]);
  return hits;
}
// Where in what was seen tokens survive: a grid of cells for each step, of as many steps as are told apart.
function pictures(text, values, name) {
  if (!text.grid) { put("seen"); return; }
  const [down, across] = text.grid, size = down * across, steps = Math.floor(text.vision.length / size), most = 24, every = Math.ceil(steps / most);
  put("seen", Array.from({ length: Math.ceil(steps / every) }, (_, i) => i * every).map((step) => {
    const own = text.vision.slice(step * size, (step + 1) * size).map((at) => values[at]), mean = own.reduce((a, b) => a + b, 0) / size;
    return make("div", {}, make("h3", {}, `step ${step + 1} of ${steps}`, make("span", { class: "note" }, `${Math.round(100 * mean)} %`)),
      cells(Array.from({ length: down }, (_, i) => String(i)), Array.from({ length: across }, (_, i) => String(i)), (r, c) => ({ v: Math.sqrt(own[r * across + c]), tip: [name, `step ${step + 1}, row ${r}, column ${c}`, `held by ${Math.round(100 * own[r * across + c])} % of layers and heads`] }),
        { down: "row", across: "column", title: `Where in step ${step + 1} tokens survive: ${name}` }));
  }));
}
function tokens(rows) {
  byId("s-text").hidden = !D.maps.rows.length;
  const order = shownMethods(new Set(rows.keys())).filter((m) => m !== FULL);
  if (!order.length) { put("strips"); put("seen"); put("ask"); put("text"); put("text-scale"); byId("text-sub").textContent = `No map of this choice.${leftOut()}`; return; }
  const m = order.includes(state.token) ? state.token : order[0], row = rows.get(m), text = D.maps.texts[row[5]];
  byId("text-sub").textContent = `${row[0]}, budget ${state.budget}. Each strip is the text from start to end; the stronger a token's colour, the more layers and heads still hold it. Choose a method to read what it kept, and a question to find its answer.`;
  put("text-scale", scale("held by", ["0", "25 %", "all heads"], "accent"));
  const survival = (one) => Array.from(one[7], (c) => D.maps.steps.indexOf(c) / 63);
  put("strips", order.flatMap((one) => {
    const values = survival(rows.get(one)), canvas = make("canvas", { width: values.length, height: 1, onclick: () => set({ token: one }), "aria-hidden": "true" });
    const keep = getComputedStyle(document.body).getPropertyValue("--accent").trim(), pen = canvas.getContext("2d");
    values.forEach((v, i) => { pen.globalAlpha = Math.sqrt(v); pen.fillStyle = keep; pen.fillRect(i, 0, 1, 1); });
    return [make("button", { "data-m": one, "aria-pressed": String(one === m), onclick: () => set({ token: one }) }, breakable(NAMES[one])), canvas,
      make("span", { class: "n" }, `${Math.round((100 * values.reduce((a, b) => a + b, 0)) / values.length)} %`)];
  }));
  pictures(text, survival(row), NAMES[m]);
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
const methodColumn = { name: "method", word: true, value: (row) => NAMES[row.m], show: (row) => named(row.m) };
const word = (name, show = (row) => row[name]) => ({ name, word: true, value: show, show });

function leakage() {
  byId("s-leak").hidden = !D.leakage.length;
  if (!D.leakage.length) return;
  const distinct = (name) => [...new Set(D.leakage.map((row) => row[name]))], spans = distinct("spans");
  const kind = spans.includes(state.spans) ? state.spans : spans[0], what = state.leak, found = looks(distinct("method"));
  put("leak-pick", tabs("leak", [["leak", "leaks"], ["directive", "follows the directive"]], what, "what is drawn"), make("span", { class: "pair" }, "spans", tabs("spans", spans.map((v) => [v, v]), kind)));
  byId("leak-shown").textContent = `${what === "leak" ? "Share of replies that leak" : "Share of replies that follow the directive"}, against the share of tokens removed; spans: ${kind}.`;
  key("leak-key", found);
  const hosts = distinct("order").map((order) => [order, make("div")]);
  put("leak", hosts.map(([order, host]) => make("div", { class: "small" }, make("h3", {}, order), host)));
  for (const [order, host] of hosts) {
    const series = [...found].map(([m, look]) => {
      const rows = D.leakage.filter((row) => row.method === m && row.order === order && row.spans === kind).sort((a, b) => a.removed - b.removed);
      const peak = rows.reduce((most, row) => (most && (most.leak || 0) >= (row.leak || 0) ? most : row), null);
      return { m, look, name: NAMES[m], points: rows.map((row) => ({ x: row.removed, y: row[what], low: row[what + "_low"], high: row[what + "_high"], ring: what === "leak" && row === peak && row.leak > 0,
        tip: [`${NAMES[m]}, ${kind}`, `${Math.round(100 * row.removed)} % removed`, `leaks ${num(row.leak)}${range(row.leak_low, row.leak_high)}`, `follows ${num(row.directive)}${range(row.directive_low, row.directive_high)}`,
          row.keep_defence !== null && `kept of the defence ${num(row.keep_defence, 2)}, of the directive ${num(row.keep_directive, 2)}`, `n = ${row.n}`] })) };
    });
    lines(host, { series, xs: [0, 0.25, 0.5, 0.75, 1].map((v) => ({ at: v, text: `${100 * v} %` })), ys: scoreAxis, domain: [0, 1], range: [0, 1], height: 260, labels: false, xLabel: "removed", yLabel: what === "leak" ? "leaks" : "follows", title: `${what} against what was removed: ${order}` });
  }
  const peaks = D.peaks.map((i) => D.leakage[i]).map((row) => ({ ...row, m: row.method }));
  sortable(byId("leak-table"), peaks, [methodColumn, word("order"), word("spans"), { name: "peak leakage", value: (r) => r.leak, show: (r) => [num(r.leak), make("small", {}, range(r.leak_low, r.leak_high))] },
    { name: "removed there", value: (r) => r.removed, show: (r) => `${Math.round(100 * r.removed)} %` }, { name: "follows there", value: (r) => r.directive, show: (r) => num(r.directive) }, { name: "n", value: (r) => r.n, show: (r) => String(r.n) }], 3, 12);
}

// Rows whose divergence is above that of random drops at the same budget.
function worseThanRandom() {
  const random = new Map(D.fidelity.filter((row) => row.method === RANDOM && row.kl).map((row) => [row.budget, row.kl[0]]));
  return D.fidelity.filter((row) => row.method !== RANDOM && row.kl && random.has(row.budget) && row.kl[0] > random.get(row.budget));
}
function fidelity() {
  byId("s-fidelity").hidden = !D.fidelity.length;
  if (!D.fidelity.length) return;
  const rows = D.fidelity.filter((row) => row.kl), labels = [...new Set(rows.filter((row) => row.method !== FULL).map((row) => row.budget))];
  const mean = (m) => { const own = rows.filter((row) => row.method === m); return own.reduce((sum, row) => sum + row.kl[0], 0) / own.length; };
  const found = looks([...new Set(rows.map((row) => row.method))].sort((a, b) => mean(a) - mean(b)));
  const high = Math.max(1e-6, ...rows.map((row) => row.kl[2] ?? row.kl[0])), worse = worseThanRandom();
  const names = [...new Set(worse.map((row) => row.method))].map((m) => `${NAMES[m]} (${listed(worse.filter((row) => row.method === m).map((row) => row.budget))})`);
  put("fidelity-word", breakable(names.length ? `Worse than random drops: ${listed(names)}. What a method answers, and how near it stays to the full cache, are different things.` : ""));
  key("fidelity-key", found);
  onAxes(byId("fidelity-chart"), labels, D.fidelity_places, (host, axis) => lines(host, { series: [...found].map(([m, look]) => ({ m, look, name: NAMES[m], flat: m === FULL, points: rows.filter((row) => row.method === m && (m === FULL || axis.place.has(row.budget))).map((row) => ({ x: axis.place.get(row.budget) ?? 0.5, y: row.kl[0], low: row.kl[1], high: row.kl[2],
    tip: [`${NAMES[m]} at ${row.budget}`, `KL ${num(row.kl[0])}${range(row.kl[1], row.kl[2])} nats`, `ratio ${num(row.ratio)}`, count(row.segments, "segment")] })) })),
  xs: axis.xs, ys: nice(high).map((v) => ({ at: v, text: String(v) })), domain: [0, 1], range: [0, high], height: 340, xLabel: axis.title, yLabel: "KL, nats: lower is better", title: `KL divergence against ${axis.title}` }));
  const one = (name, title, digits = 3, rising = false) => ({ name: title, rising, value: (row) => row[name] && row[name][0], show: (row) => row[name] && num(row[name][0], digits) });
  const divergence = { ...one("kl", "KL", 3, true), show: (row) => [num(row.kl && row.kl[0]), worse.some((other) => other.method === row.m && other.budget === row.budget) ? make("small", { class: "bad" }, "above random") : null] };
  sortable(byId("fidelity-table"), D.fidelity.map((row) => ({ ...row, m: row.method })), [methodColumn, { name: "budget", value: (r) => D.fidelity_places[r.budget][1], show: (r) => r.budget }, divergence, { name: "ratio", rising: true, value: (r) => r.ratio, show: (r) => num(r.ratio) }, one("top1", "top-1"), one("output_error", "error", 3, true), one("prefix", "prefix", 1), one("loyalty", "loyalty", 2)], 2, 14);
}
function lost() {
  const failed = D.failures.reduce((sum, row) => sum + row[2], 0), below = D.losses.reduce((sum, row) => sum + row[1], 0), of = CELLS.filter((cell) => cell.task !== 0 && cell.m !== FULL && cell.m !== RANDOM).length;
  byId("lost-sub").textContent = `${failed ? `${count(failed, "item")} failed; they count, as 0 in scores over all tasks.` : "No item failed."} ${below.toLocaleString("en")} of ${count(of, "compressed cell")} ${below === 1 ? "lies" : "lie"} below the full cache by more than their interval (random not counted).`;
  byId("failures").hidden = !D.failures.length;
  if (D.failures.length) sortable(byId("failures"), D.failures.map(([name, error, n, tasks]) => ({ m: indexOf(name), error, n, tasks: tasks.length > 4 ? `${count(tasks.length, "task")}: ${tasks.slice(0, 3).join(", ")}, …` : tasks.join(", ") })), [methodColumn, { name: "items", value: (r) => r.n, show: (r) => r.n.toLocaleString("en") }, { ...word("error"), wrap: true }, { ...word("tasks"), wrap: true }], 1, 8);
  byId("lost").hidden = !D.losses.length;
  const worst = (row) => `${D.tasks[row.worst.task]} at ${D.budgets[row.worst.budget]}, ${MODE[D.modes[row.worst.mode][0]]}, ${D.lengths[row.worst.length].toLocaleString("en")} tokens`;
  if (D.losses.length) sortable(byId("lost"), D.losses.map(([m, n, all, i]) => ({ m, n, all, worst: CELLS[i] })), [methodColumn, { name: "below full", value: (r) => r.n / r.all, show: (r) => [`${Math.round((100 * r.n) / r.all)} %`, make("small", {}, ` ${r.n.toLocaleString("en")} of ${r.all.toLocaleString("en")} cells`)] },
    { name: "by at most", value: (r) => -r.worst.minus_full, show: (r) => signed(r.worst.minus_full) }, word("where", worst)], 1, 10);
}
function everything() {
  const mode = D.modes.findIndex(([one]) => one === state.mode), length = D.lengths.indexOf(state.length), task = D.tasks.indexOf(state.task);
  const rows = CELLS.filter((cell) => cell.mode === mode && cell.length === length && cell.task === task && (cell.m === FULL || D.budgets[cell.budget] === state.budget));
  byId("table-sub").textContent = `${where()}, budget ${state.budget}: ${rows.length.toLocaleString("en")} of ${count(CELLS.length, "cell")}; choose another task, mode, length or budget for theirs. Press the name of a column to sort. Those of single tasks are in cells.csv.`;
  const plain = (name, title, show = num) => ({ name: title, value: (row) => row[name], show: (row) => show(row[name]) });
  sortable(byId("table"), rows, [methodColumn, { name: "budget", value: (r) => (r.m === FULL ? 1e9 : r.budget), show: (r) => D.budgets[r.budget] },
    { name: "score", value: (r) => r.score, show: (r) => [num(r.score), make("small", {}, range(r.low, r.high, (v) => num(v, 2)))] }, { name: "− full", value: (r) => r.minus_full, show: (r) => [signed(r.minus_full), make("small", {}, range(r.minus_full_low, r.minus_full_high, (v) => signed(v).slice(0, 5)))] },
    plain("ratio", "ratio"), plain("bytes", "bytes", (v) => (v === null ? "–" : size(v))), plain("peak_bytes", "peak", (v) => (v === null ? "–" : size(v))), plain("read_per_s", "read/s", big), plain("written_per_s", "written/s", big), plain("leaked", "leaked"), plain("n", "n", String), plain("failed", "failed", String)], 2, 40);
}
