// Draws everything, and again when something changes.
function render() {
  hideTip(); bar(); lead(); scores(); chips(); multiples();
  pareto("pareto-bytes", "ratio", "ratio: bytes held / bytes of the full cache", true, true);
  pareto("pareto-speed", "written_per_s", "tokens written per second", false, false);
  key("pareto-key", new Map(D.measured.filter(drawn).map((m) => [m, lookOf(m)])));
  heat(); needle();
  const rows = mapsHere();
  budgetMap(rows); tokens(rows); leakage(); fidelity(); lost(); everything();
  regions.forEach(edges);
  document.body.dataset.ready = "yes";
}
const regions = document.querySelectorAll(".scroll");
for (const region of regions) region.addEventListener("scroll", () => edges(region), { passive: true });
if (innerWidth <= 820) document.querySelector(".reading").open = false;
readHash();
settle(true);
render();
addEventListener("hashchange", () => { readHash(); settle(true); render(); });
let wait = 0, last = innerWidth;
addEventListener("resize", () => { clearTimeout(wait); wait = setTimeout(() => { if (innerWidth !== last) { last = innerWidth; render(); } }, 120); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", render);
// On paper the charts are as wide as a page, and nothing is folded.
function paper(on) {
  if (onPaper() === on) return;
  if (on) document.querySelector(".reading").open = true;
  document.body.classList.toggle("paper", on);
  render();
}
addEventListener("beforeprint", () => paper(true));
addEventListener("afterprint", () => paper(false));
matchMedia("print").addEventListener("change", (event) => paper(event.matches));
