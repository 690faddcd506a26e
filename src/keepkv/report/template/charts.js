"use strict";
// Small charts of their own: elements, a tooltip, lines with intervals, a ranking, a grid. Text is only ever set as text.
const make = (tag, given = {}, ...kids) => fill(document.createElement(tag), given, kids);
const draw = (tag, given = {}, ...kids) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), given, kids);
function fill(node, given, kids) {
  for (const [name, value] of Object.entries(given)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...kids.flat().filter((kid) => kid !== null && kid !== undefined && kid !== false));
  return node;
}
const byId = (id) => document.getElementById(id);
const put = (host, ...kids) => (typeof host === "string" ? byId(host) : host).replaceChildren(...kids.flat());

const tip = byId("tip");
function showTip(event, [title, ...rest]) {
  put(tip, make("b", {}, title), ...rest.filter(Boolean).map((line) => make("div", {}, line)));
  tip.hidden = false;
  const box = tip.getBoundingClientRect(), gap = 14;
  const left = event.clientX + gap + box.width > innerWidth ? event.clientX - gap - box.width : event.clientX + gap;
  const top = event.clientY + gap + box.height > innerHeight ? event.clientY - gap - box.height : event.clientY + gap;
  tip.style.transform = `translate(${Math.max(4, left)}px,${Math.max(4, top)}px)`;
}
const hideTip = () => { tip.hidden = true; };
const tipped = (lines) => ({ onpointermove: (event) => showTip(event, lines()), onpointerleave: hideTip });

// One method stands out in every chart at once.
let hotMethod = null;
function hot(m) {
  if (m === hotMethod) return;
  hotMethod = m;
  document.body.classList.toggle("hovering", m !== null);
  for (const node of document.querySelectorAll(".hot")) node.classList.remove("hot");
  if (m !== null) for (const node of document.querySelectorAll(`[data-m="${m}"]`)) node.classList.add("hot");
}

const ink = (method) => `--c:var(--h${method.hue});--own:var(--h${method.hue})`;
const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

// lines(host, {series, xs, ys, domain, range, ...}): series = [{m, method, quiet, flat, points: [{x, y, low, high, tip, ring}], name}]
function lines(host, o) {
  const width = Math.max(150, host.clientWidth || 640), height = o.height;
  const small = Boolean(o.small), labels = !small && o.labels !== false && width > 520;
  const pad = small ? { l: 27, r: 6, t: 7, b: 19 } : { l: 50, r: labels ? 168 : 14, t: 30, b: 44 };
  const [x0, x1] = o.domain, [y0, y1] = o.range;
  const inset = small ? 4 : 12;
  const X = (x) => pad.l + inset + ((x - x0) / (x1 - x0 || 1)) * (width - pad.l - pad.r - 2 * inset);
  const Y = (y) => height - pad.b - ((y - y0) / (y1 - y0 || 1)) * (height - pad.t - pad.b);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": o.title });
  for (const { at, text } of o.ys) {
    svg.append(draw("line", { class: "gridline", x1: pad.l, x2: width - pad.r, y1: Y(at), y2: Y(at) }));
    svg.append(draw("text", { x: pad.l - 7, y: Y(at) + 4, "text-anchor": "end", "font-size": small ? 10 : 12 }, text));
  }
  let end = -Infinity;
  for (const { at, text } of o.xs) {
    const x = X(at), room = text.length * (small ? 5.4 : 6.6);
    if (x - room / 2 < end + 3) continue;
    end = x + room / 2;
    svg.append(draw("text", { x, y: height - pad.b + (small ? 14 : 19), "text-anchor": "middle", "font-size": small ? 10 : 12 }, text));
  }
  svg.append(draw("line", { class: "axis", x1: pad.l, x2: width - pad.r, y1: height - pad.b, y2: height - pad.b }));
  if (!small) svg.append(draw("text", { x: 0, y: 11 }, o.yLabel || "score"));
  if (o.xLabel) svg.append(draw("text", { x: (pad.l + width - pad.r) / 2, y: height - 5, "text-anchor": "middle" }, o.xLabel));
  const near = [], ends = [], faint = o.series.filter((s) => !s.quiet).length > 5 ? "opacity:.055" : null;
  for (const s of [...o.series].sort((a, b) => Boolean(b.quiet) - Boolean(a.quiet))) {
    const shown = s.points.filter((p) => p.x !== null && p.y !== null && Number.isFinite(p.x) && Number.isFinite(p.y));
    if (!shown.length) continue;
    const group = draw("g", { class: "series" + (s.quiet ? " quiet" : ""), "data-m": s.m, style: ink(s.method) });
    let at = shown.map((p) => [X(p.x), Y(p.y)]);
    if (s.flat) at = [[pad.l, at[0][1]], [width - pad.r, at[0][1]]];
    const spread = shown.filter((p) => p.low !== null && p.low !== undefined && p.high !== null);
    if (!small && !o.bars && spread.length) {
      const up = s.flat ? at.map(([x]) => [x, Y(spread[0].high)]) : spread.map((p) => [X(p.x), Y(p.high)]);
      const down = s.flat ? at.map(([x]) => [x, Y(spread[0].low)]) : spread.map((p) => [X(p.x), Y(p.low)]);
      group.append(draw("path", { class: "band", style: faint, d: path([...up, ...down.reverse()]) + "Z" }));
    }
    if (o.bars && !s.quiet) for (const p of spread) group.append(draw("line", { x1: X(p.x), x2: X(p.x), y1: Y(p.low), y2: Y(p.high), opacity: 0.35 }));
    group.append(draw("path", { d: path(at), "stroke-dasharray": s.dash ?? s.method.dash, opacity: o.bars ? 0.45 : null }));
    for (const p of shown) {
      if (!s.flat && !small) group.append(draw("circle", { cx: X(p.x), cy: Y(p.y), r: o.bars ? 4.2 : 3.4 }));
      if (p.ring) group.append(draw("circle", { class: "ring", cx: X(p.x), cy: Y(p.y), r: small ? 4 : 7 }));
      near.push({ x: s.flat ? null : X(p.x), y: Y(p.y), m: s.m, tip: p.tip, quiet: s.quiet });
    }
    if (labels && !s.quiet) ends.push({ group, y: at[at.length - 1][1], x: at[at.length - 1][0], text: s.name || s.method.name });
    svg.append(group);
  }
  if (o.front && o.front.length) {
    const steps = o.front.flatMap(([x, y], i) => (i ? [[X(x), Y(o.front[i - 1][1])], [X(x), Y(y)]] : [[X(x), Y(y)]]));
    svg.append(draw("path", { class: "frontier", d: path(steps) }));
  }
  spreadLabels(ends, width - pad.r + 12, pad.t, height - pad.b);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), scale = width / box.width;
    const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
    let best = null, least = small ? 900 : 2500;
    for (const p of near) {
      const away = (p.x === null ? 0 : (p.x - x) ** 2) + (p.y - y) ** 2 + (p.x === null ? 60 : 0) + (p.quiet ? 30 : 0);
      if (away < least) [best, least] = [p, away];
    }
    hot(best ? best.m : null);
    if (best) showTip(event, best.tip); else hideTip();
  });
  svg.addEventListener("pointerleave", () => { hot(null); hideTip(); });
  put(host, svg);
}

// Names at the ends of lines, pushed apart, with a thin line to where they belong.
function spreadLabels(ends, x, top, bottom) {
  const step = Math.min(15, (bottom - top) / Math.max(1, ends.length));
  ends.sort((a, b) => a.y - b.y);
  let last = top - step;
  for (const one of ends) last = one.at = Math.max(one.y, last + step);
  let limit = bottom + step;
  for (const one of [...ends].reverse()) limit = one.at = Math.min(one.at, limit - step);
  for (const { group, y, at, x: from, text } of ends) {
    const short = text.length > 22 ? text.slice(0, 21) + "…" : text;
    group.append(draw("line", { class: "lead-line", x1: Math.max(from, x - 12), y1: y, x2: x - 2, y2: at }));
    group.append(draw("text", { x: x + 1, y: at + 4, "font-size": Math.min(12, step) }, short));
  }
}

// rank(host, rows): rows = [{m, method, value, low, high, text, tip, quiet, onclick}], best first; mark: a line across all.
function rank(host, rows, mark) {
  const width = Math.max(240, host.clientWidth || 400), step = Math.min(27, Math.max(19, 430 / rows.length));
  const name = Math.min(190, width * 0.42), right = 44, height = rows.length * step + 24;
  const X = (v) => name + 8 + Math.max(0, Math.min(1, v)) * (width - name - right - 8);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Methods by score, best first" });
  for (const v of [0, 0.25, 0.5, 0.75, 1]) {
    svg.append(draw("line", { class: "gridline", x1: X(v), x2: X(v), y1: 0, y2: height - 18 }));
    svg.append(draw("text", { x: X(v), y: height - 3, "text-anchor": "middle", "font-size": 11 }, String(v)));
  }
  if (mark !== null) svg.append(draw("line", { x1: X(mark), x2: X(mark), y1: 0, y2: height - 18, stroke: "var(--hfull)", "stroke-dasharray": "4 4", opacity: 0.6 }));
  rows.forEach((row, i) => {
    const y = i * step + step / 2, most = Math.floor((name - 6) / 7.3);
    const text = row.method.name.length > most ? row.method.name.slice(0, most - 1) + "…" : row.method.name;
    const group = draw("g", { class: "row series", "data-m": row.m, style: ink(row.method) + ";cursor:pointer", onclick: row.onclick,
      onpointermove: (event) => { hot(row.m); showTip(event, row.tip); }, onpointerleave: () => { hot(null); hideTip(); } },
      draw("rect", { x: 0, y: y - step / 2, width, height: step, fill: "transparent" }),
      draw("text", { x: name, y: y + 4, "text-anchor": "end", opacity: row.quiet ? 0.6 : 1 }, text));
    if (row.value !== null) {
      if (row.low !== null) group.append(draw("line", { x1: X(row.low), x2: X(row.high), y1: y, y2: y, "stroke-width": 5, opacity: 0.3, "stroke-linecap": "round" }));
      group.append(draw("circle", { cx: X(row.value), cy: y, r: 4.6 }));
    }
    group.append(draw("text", { x: width, y: y + 4, "text-anchor": "end", class: "strong" }, row.text));
    svg.append(group);
  });
  put(host, svg);
}

// cells(rows, columns, at): at(r, c) gives {v in 0..1, tip} or null; a small grid with labels at its sides.
function cells(rows, columns, at, title) {
  const left = 34, size = Math.max(6, Math.min(30, 150 / columns.length)), tall = Math.max(5, Math.min(15, 190 / rows.length));
  const width = left + columns.length * size, height = rows.length * tall + 17;
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, style: `max-width:${width * 1.25}px`, role: "img", "aria-label": title });
  rows.forEach((row, r) => {
    if (r % Math.ceil(12 / tall) === 0) svg.append(draw("text", { x: left - 5, y: (r + 0.5) * tall + 3.5, "text-anchor": "end", "font-size": 9.5 }, row));
    columns.forEach((_, c) => {
      const one = at(r, c);
      if (one) svg.append(draw("rect", { x: left + c * size, y: r * tall, width: size - 1, height: tall - 1, rx: 1.5, style: `--v:${one.v.toFixed(3)}`, ...tipped(() => one.tip) }));
    });
  });
  const every = Math.ceil(28 / size);
  columns.forEach((column, c) => {
    if (c % every === 0) svg.append(draw("text", { x: left + (c + 0.5) * size, y: height - 4, "text-anchor": "middle", "font-size": 9.5 }, column));
  });
  return svg;
}

// A table that sorts by the column whose head is pressed. columns: [{name, word, show(row), value(row)}].
function sortable(host, rows, columns, first, limit = Infinity) {
  let by = first, down = true, all = false;
  const render = () => {
    const key = columns[by].value, sorted = [...rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === null || x === undefined) return 1;
      if (y === null || y === undefined) return -1;
      return (typeof x === "string" ? x.localeCompare(y) : x - y) * (down ? -1 : 1);
    });
    const head = columns.map((column, i) => make("th", { scope: "col", class: column.word ? "word" : null, "aria-sort": i === by ? (down ? "descending" : "ascending") : null },
      make("button", { onclick: () => { down = i === by ? !down : !column.word; by = i; render(); } }, column.name)));
    const body = sorted.slice(0, all ? Infinity : limit).map((row) => make("tr", { "data-m": row.m }, columns.map((column, i) => {
      const shown = column.show(row);
      return make(i ? "td" : "th", { class: column.wrap ? "wrap" : column.word ? "word" : null, scope: i ? null : "row" }, shown === null || shown === undefined ? "–" : shown);
    })));
    const more = sorted.length > limit && !all && make("button", { onclick: () => { all = true; render(); } }, `Show all ${sorted.length}`);
    put(host, make("table", { class: "sortable" }, make("thead", {}, make("tr", {}, head)), make("tbody", {}, body)), more || []);
  };
  render();
}
