// Small charts of their own: lines with intervals, a ranking, grids and their scales.

// lines(host, {series, xs, ys, domain, range, ...}): series = [{m, look, flat, name, points: [{x, y, low, high, tip, ring}]}]; dots: points of no series.
function lines(host, o) {
  const small = Boolean(o.small), wide = small ? Infinity : 240 + 165 * o.xs.length; // two points are no reason for a long line
  const width = Math.max(120, Math.min(host.clientWidth || 640, wide)), height = o.height;
  const labels = !small && o.labels !== false && width > 480;
  const pad = small ? { l: 27, r: 6, t: 7, b: 19 } : { l: 50, r: labels ? 178 : 14, t: 30, b: 44 };
  const [x0, x1] = o.domain, [y0, y1] = o.range;
  const inset = small ? 4 : 12;
  const X = (x) => pad.l + inset + ((x - x0) / (x1 - x0 || 1)) * (width - pad.l - pad.r - 2 * inset);
  const Y = (y) => height - pad.b - ((y - y0) / (y1 - y0 || 1)) * (height - pad.t - pad.b);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, style: `max-width:${width}px`, role: "img", "aria-label": o.title });
  for (const { at, text } of o.ys) {
    svg.append(draw("line", { class: "gridline", x1: pad.l, x2: width - pad.r, y1: Y(at), y2: Y(at) }));
    svg.append(draw("text", { x: pad.l - 7, y: Y(at) + 4, "text-anchor": "end", "font-size": small ? 10 : 12 }, text));
  }
  let end = -Infinity;
  for (const { at, text } of o.xs) {
    const room = text.length * (small ? 6.2 : 6.8), x = Math.min(X(at), width - room / 2);
    if (x - room / 2 < end + 3) continue;
    end = x + room / 2;
    svg.append(draw("text", { x, y: height - pad.b + (small ? 14 : 19), "text-anchor": "middle", "font-size": small ? 10 : 12 }, text));
  }
  svg.append(draw("line", { class: "axis", x1: pad.l, x2: width - pad.r, y1: height - pad.b, y2: height - pad.b }));
  if (!small) svg.append(draw("text", { x: 0, y: 11 }, o.yLabel || "score"));
  if (o.xLabel) svg.append(draw("text", { x: (pad.l + width - pad.r) / 2, y: height - 5, "text-anchor": "middle" }, o.xLabel));
  const near = [], ends = [], faint = o.series.length > 6 ? "opacity:.06" : null;
  for (const dot of o.dots || []) {
    svg.append(draw("circle", { class: "dot", cx: X(dot.x), cy: Y(dot.y), r: 2.2, "data-m": dot.m }));
    near.push({ x: X(dot.x), y: Y(dot.y), m: dot.m, tip: dot.tip, behind: true });
  }
  for (const s of [...o.series].reverse()) {
    const shown = s.points.filter((p) => p.x !== null && p.y !== null && Number.isFinite(p.x) && Number.isFinite(p.y));
    if (!shown.length) continue;
    const group = draw("g", { class: "series", "data-m": s.m, style: ink(s.look) });
    let at = shown.map((p) => [X(p.x), Y(p.y)]);
    if (s.flat) at = [[pad.l, at[0][1]], [width - pad.r, at[0][1]]];
    const spread = shown.filter((p) => p.low !== null && p.low !== undefined && p.high !== null);
    if (!small && !o.bars && spread.length > 1 - Boolean(s.flat)) {
      const up = s.flat ? at.map(([x]) => [x, Y(spread[0].high)]) : spread.map((p) => [X(p.x), Y(p.high)]);
      const down = s.flat ? at.map(([x]) => [x, Y(spread[0].low)]) : spread.map((p) => [X(p.x), Y(p.low)]);
      group.append(draw("path", { class: "band", style: faint, d: path([...up, ...down.reverse()]) + "Z" }));
    }
    if (!s.flat && (o.bars || shown.length < 2)) for (const p of spread) group.append(draw("line", { x1: X(p.x), x2: X(p.x), y1: Y(p.low), y2: Y(p.high), opacity: 0.4 }));
    group.append(draw("path", { class: "line", d: path(at), "stroke-dasharray": s.look.dash || null, opacity: o.bars ? 0.5 : null }));
    for (const p of shown) {
      if (!s.flat) group.append(mark(s.look, X(p.x), Y(p.y), small ? 2.4 : 4));
      if (p.ring) group.append(draw("circle", { class: "ring", cx: X(p.x), cy: Y(p.y), r: 8 }));
      near.push({ x: s.flat ? null : X(p.x), y: Y(p.y), m: s.m, tip: p.tip });
    }
    if (labels) ends.push({ group, y: at[at.length - 1][1], x: at[at.length - 1][0], mean: at.reduce((sum, [, y]) => sum + y, 0) / at.length, text: s.name, look: s.look });
    svg.append(group);
  }
  if (o.front && o.front.length) {
    const steps = o.front.flatMap(([x, y], i) => (i ? [[X(x), Y(o.front[i - 1][1])], [X(x), Y(y)]] : [[X(x), Y(y)]]));
    svg.append(draw("path", { class: "frontier", d: path(steps) }));
  }
  spreadLabels(ends, width - pad.r + 14, pad.t, height - pad.b);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), scale = width / box.width;
    const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
    let best = null, least = small ? 900 : 2500;
    for (const p of near) {
      const away = (p.x === null ? 0 : (p.x - x) ** 2) + (p.y - y) ** 2 + (p.x === null ? 60 : 0) + (p.behind ? 30 : 0);
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
  const step = Math.min(16, (bottom - top) / Math.max(1, ends.length));
  ends.sort((a, b) => Math.round(a.y - b.y) || a.mean - b.mean);
  let last = top - step;
  for (const one of ends) last = one.at = Math.max(one.y, last + step);
  let limit = bottom + step;
  for (const one of [...ends].reverse()) limit = one.at = Math.min(one.at, limit - step);
  for (const { group, y, at, x: from, text, look } of ends) {
    const parts = text.split(/(?<=[:,/=])/);
    while (parts.length > 1 && parts.join("").length > 21) parts.pop();
    const short = parts.join("");
    group.append(draw("line", { class: "lead-line", x1: Math.max(from, x - 14), y1: y, x2: x - 2, y2: at }));
    group.append(mark(look, x + 4, at, 3.6), draw("text", { x: x + 13, y: at + 4, "font-size": Math.min(12, step) }, short + (short === text ? "" : "…")));
  }
}

// rank(host, rows): rows = [{m, look, name, value, low, high, text, tip, press}], best first; mark: a line across all, at the full cache's score.
function rank(host, rows, full) {
  const at = (v) => `${(100 * Math.max(0, Math.min(1, v))).toFixed(2)}%`;
  const body = rows.map((row) => make("tr", { class: "row", "data-m": row.m, style: row.look ? ink(row.look) : null, onpointermove: (event) => { hot(row.m); showTip(event, row.tip); }, onpointerleave: () => { hot(null); hideTip(); } },
    make("th", { scope: "row" }, row.press ? make("button", { onclick: row.press, "aria-pressed": String(Boolean(row.look)) }, breakable(row.name)) : breakable(row.name)),
    make("td", { class: full === null ? "strip" : "strip full", style: full === null ? null : `--full:${at(full)}` }, make("div", {},
      row.value === null ? null : [row.low === null ? null : make("i", { class: "bar", style: `left:${at(row.low)};right:calc(100% - ${at(row.high)})` }),
        make("span", { style: `left:${at(row.value)}` }, row.look ? badge(row.look) : make("i", { class: "plain" }))])),
    make("td", {}, row.text)));
  put(host, make("table", { class: "rank" }, make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "method"), make("th", { scope: "col" }, make("span", { class: "ends" }, make("span", {}, "0"), make("span", {}, "score"), make("span", {}, "1"))), make("th", { scope: "col" }, make("span", { class: "unseen" }, "score")))), make("tbody", {}, body)));
}

// cells(rows, columns, at, o): at(r, c) gives {v in 0..1, tip} or null; a small grid with labels and titles at its sides.
function cells(rows, columns, at, o) {
  const left = 48, top = 2, size = Math.max(6, Math.min(32, 150 / columns.length)), tall = Math.max(5, Math.min(15, 190 / rows.length));
  const width = left + columns.length * size + 8, height = top + rows.length * tall + 31;
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, style: `max-width:${width * 1.15}px`, role: "img", "aria-label": o.title });
  rows.forEach((row, r) => {
    if (r % Math.ceil(12 / tall) === 0) svg.append(draw("text", { x: left - 5, y: top + (r + 0.5) * tall + 3.5, "text-anchor": "end", "font-size": 9.5 }, row));
    columns.forEach((_, c) => {
      const one = at(r, c);
      if (one) svg.append(draw("rect", { x: left + c * size, y: top + r * tall, width: size - 1, height: tall - 1, rx: 1.5, style: `--v:${one.v.toFixed(3)}`, ...tipped(() => one.tip) }));
    });
  });
  const middle = top + (rows.length * tall) / 2;
  svg.append(draw("text", { x: 9, y: middle, transform: `rotate(-90 9 ${middle})`, "text-anchor": "middle", "font-size": 9.5 }, o.down));
  svg.append(draw("text", { x: left + (columns.length * size) / 2, y: height - 3, "text-anchor": "middle", "font-size": 9.5 }, o.across));
  const every = Math.ceil(Math.max(...columns.map((column) => column.length * 5.6 + 4)) / size);
  columns.forEach((column, c) => {
    if (c % every === 0) svg.append(draw("text", { x: left + (c + 0.5) * size, y: top + rows.length * tall + 12, "text-anchor": "middle", "font-size": 9.5 }, column));
  });
  return svg;
}

// A bar of the shades of a grid or table, with what its ends stand for.
const scale = (what, stops, kind) => make("p", { class: "scale" }, make("span", {}, what), make("span", { class: `ramp ${kind}`, "aria-hidden": "true" }), make("span", { class: "stops" }, stops.map((text) => make("span", {}, text))));
