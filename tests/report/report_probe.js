// Run at the end of a report: what is seen in it, before and after some of its buttons are pressed.
{
  const every = (selector, within = document) => [...within.querySelectorAll(selector)];
  const sizes = (section) => every("svg, canvas, table:not([hidden]), .text", section)
    .filter((node) => !node.closest("button, .badge") && !node.matches(".badge"))
    .map((node) => node.getBoundingClientRect()).map((box) => [box.width, box.height]);
  const scores = () => every("#table tbody tr").map((row) => Number(row.cells[2].firstChild.textContent));
  const view = () => ({
    sub: byId("score-sub").textContent,
    task: document.querySelector("select[data-pick=task]").value,
    marks: every("#rank .row").map((row) => [row.querySelector("th"), row.lastChild].map((part) => part.textContent)),
    tables: every("table.summary").filter((table) => !table.hidden).map((table) => table.caption.textContent),
    shown: every("#score-chart .series").length,
  });
  const found = {
    ready: document.body.dataset.ready,
    first: view(),
    wide: [document.documentElement.scrollWidth, innerWidth],
    charts: Object.fromEntries(every("main section:not([hidden])").map((section) => [section.id, sizes(section)])),
    answer: every(".text .here").map((token) => token.textContent).join(""),
    rings: every("#leak .ring").length,
    colours: every("[data-m][style*='--c']").map((node) => [Number(node.dataset.m), node.style.getPropertyValue("--c")]),
    axes: every("#score-chart svg").map((chart) => chart.getAttribute("aria-label")),
    edges: every(".scroll.more-right").map((region) => region.id),
    bare: every(".scroll").filter((region) => region.tabIndex !== 0 || !region.ariaLabel || region.getAttribute("role") !== "region").length,
    fidelity: [byId("fidelity-word").textContent, every("#fidelity-table tbody tr").map((row) => [row.cells[0].textContent, row.cells[2].textContent])],
    lead: byId("lead").textContent,
    seen: every("#seen svg").map((chart) => [chart.getAttribute("aria-label"), every("rect", chart).length]),
  };
  const choice = every("#bar button").find((button) => button.textContent === "query-aware");
  const list = document.querySelector("select[data-pick=mode]"); // where there is little room
  if (choice) choice.click();
  else Object.assign(list, { value: "aware" }).dispatchEvent(new Event("change"));
  found.clicked = view();
  const drawn = () => every("#score-chart .series[data-m]").map((line) => line.dataset.m);
  const other = () => every("#others-chips button").at(-1);
  found.ten = { before: drawn(), full: other()?.disabled };
  document.querySelector("#chips button.chip")?.click();
  found.ten.free = other() && !other().disabled;
  found.ten.added = other()?.textContent;
  other()?.click();
  found.ten.after = drawn();
  every("#chips .quick").at(-1).click();
  found.baselines = view();
  document.querySelector("#multiples h3 button")?.click();
  found.task = view();
  found.down = scores();
  every("#table th button")[2].click();
  found.up = scores();
  found.hash = location.hash;
  found.problems = problems;
  document.body.append(make("pre", { id: "probe" }, JSON.stringify(found)));
}
