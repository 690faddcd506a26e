"use strict";
// Elements, a tooltip, marks, and tables. Text is only ever set as text.
const make = (tag, given = {}, ...kids) => fill(document.createElement(tag), given, kids);
const draw = (tag, given = {}, ...kids) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), given, kids);
function fill(node, given, kids) {
  for (const [name, value] of Object.entries(given)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...kids.flat(2).filter((kid) => kid !== null && kid !== undefined && kid !== false));
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
const heats = (m) => ({ onpointerenter: () => hot(m), onpointerleave: () => hot(null) });

// Marks: a shape for each method, so that colour is never all that tells two of them apart.
const corners = (n, x, y, r, turn, inner = 1) => Array.from({ length: inner < 1 ? 2 * n : n }, (_, i) => {
  const angle = turn + (2 * Math.PI * i) / (inner < 1 ? 2 * n : n), at = inner < 1 && i % 2 ? r * inner : r;
  return [x + at * Math.sin(angle), y - at * Math.cos(angle)];
});
function plus(x, y, r, turn) {
  const w = r * 0.36, points = [[-w, -r], [w, -r], [w, -w], [r, -w], [r, w], [w, w], [w, r], [-w, r], [-w, w], [-r, w], [-r, -w], [-w, -w]];
  return points.map(([a, b]) => [x + a * Math.cos(turn) - b * Math.sin(turn), y + a * Math.sin(turn) + b * Math.cos(turn)]);
}
const SHAPES = {
  disc: (x, y, r) => corners(20, x, y, r, 0), square: (x, y, r) => corners(4, x, y, r * 1.25, Math.PI / 4), diamond: (x, y, r) => corners(4, x, y, r * 1.3, 0),
  up: (x, y, r) => corners(3, x, y + r * 0.2, r * 1.3, 0), down: (x, y, r) => corners(3, x, y - r * 0.2, r * 1.3, Math.PI), pentagon: (x, y, r) => corners(5, x, y, r * 1.1, 0),
  star: (x, y, r) => corners(5, x, y, r * 1.45, 0, 0.45), plus: (x, y, r) => plus(x, y, r * 1.15, 0), cross: (x, y, r) => plus(x, y, r * 1.2, Math.PI / 4),
};
const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
const mark = (look, x, y, r) => draw("path", { class: look.hollow ? "mark hollow" : "mark", d: path(SHAPES[look.mark](x, y, r)) + "Z" });
const ink = (look) => `--c:var(--${look.name})`;
const badge = (look, line = false) => draw("svg", { class: "badge series", viewBox: line ? "0 0 34 12" : "0 0 12 12", width: line ? 34 : 12, height: 12, style: ink(look), "aria-hidden": "true" },
  line && draw("path", { class: "line", d: "M1 6H33", "stroke-dasharray": look.dash || null }), mark(look, line ? 17 : 6, 6, 4));
// Names go on in a new line after a separator, never within a word.
const breakable = (name) => name.split(/(?<=[:,/=])/).flatMap((part, i) => (i ? [make("wbr"), part] : [part]));

// What can be scrolled shows it: a shadow at the edge that hides something.
function edges(host) {
  host.classList.toggle("more-left", host.scrollLeft > 2);
  host.classList.toggle("more-right", host.scrollLeft + host.clientWidth < host.scrollWidth - 2);
}

// A table that sorts by the column whose head is pressed. columns: [{name, word, rising, show(row), value(row)}].
function sortable(host, rows, columns, first, limit = Infinity) {
  let by = first, down = !columns[first].rising, all = false;
  const render = () => {
    const key = columns[by].value, sorted = [...rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === null || x === undefined) return 1;
      if (y === null || y === undefined) return -1;
      return (typeof x === "string" ? x.localeCompare(y) : x - y) * (down ? -1 : 1);
    });
    const head = columns.map((column, i) => make("th", { scope: "col", class: column.word ? "word" : null, "aria-sort": i === by ? (down ? "descending" : "ascending") : null },
      make("button", { onclick: () => { down = i === by ? !down : !(column.word || column.rising); by = i; render(); } }, column.name)));
    const body = sorted.slice(0, all ? Infinity : limit).map((row) => make("tr", { "data-m": row.m }, columns.map((column, i) => {
      const shown = column.show(row);
      return make(i ? "td" : "th", { class: column.wrap ? "wrap" : column.word ? "word" : null, scope: i ? null : "row" }, shown === null || shown === undefined ? "–" : shown);
    })));
    const more = sorted.length > limit && !all && make("p", { class: "more" }, `${limit} of ${sorted.length.toLocaleString("en")} rows. `, make("button", { onclick: () => { all = true; render(); } }, "Show all"));
    put(host, make("table", { class: "sortable" }, make("thead", {}, make("tr", {}, head)), make("tbody", {}, body)), more || []);
  };
  render();
}
