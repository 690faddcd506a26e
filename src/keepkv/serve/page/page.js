"use strict";
const at = (id) => document.getElementById(id);
const make = (name, props = {}, ...inside) => { const node = Object.assign(document.createElement(name), props); node.append(...inside); return node; };
const given = JSON.parse(at("given").textContent); // a sample document and questions about it
const own = "page-" + Array.from(crypto.getRandomValues(new Uint8Array(6)), (x) => x.toString(16).padStart(2, "0")).join("");
let context = null, held = false, turns = [], reading = false, running = null, limit = 1;

// --- numbers as people read them ---
const count = (x) => Math.round(x).toLocaleString("en");
const percent = (x) => (x >= 0.1 || x === 0 ? Math.round(100 * x) : (100 * x).toPrecision(2)) + " %";
function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  while (bytes >= 1024 && i < 4) { bytes /= 1024; i++; }
  return (bytes < 10 && i ? bytes.toFixed(1) : Math.round(bytes)) + " " + units[i];
}
const share = () => Math.max(0.005, Math.min(limit, Number((0.01 * 100 ** (at("budget").value / 40)).toPrecision(2))));

// --- the server ---
async function call(path, body, method) {
  const key = sessionStorage.getItem("key"), headers = {};
  if (body) headers["Content-Type"] = "application/json";
  if (key) headers.Authorization = "Bearer " + key;
  const answer = await fetch(path, { method: method || (body ? "POST" : "GET"), headers, body: body && JSON.stringify(body), signal: running?.signal });
  if (answer.status === 401) { await ask_key(); return call(path, body, method); }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  throw new Error(told?.error?.message || "the server answered " + answer.status);
}
const json = async (...args) => (await call(...args)).json();
function ask_key() {
  const door = at("door");
  if (!door.open) door.showModal();
  return new Promise((done) => door.addEventListener("close", () => { sessionStorage.setItem("key", at("key").value); done(); }, { once: true }));
}
function say(where, error) { at(where).textContent = error ? error.message[0].toUpperCase() + error.message.slice(1) : ""; }

// --- what it would take ---
let wait = 0, counted = { text: null, tokens: 0 };
function estimate() {
  at("share").textContent = percent(share());
  at("go").disabled = reading || !at("text").value.trim();
  clearTimeout(wait);
  wait = setTimeout(cost, 250);
}
async function cost() {
  const text = at("text").value, box = at("cost");
  if (!text.trim()) { box.replaceChildren("A text is read once, compressed, and can then be asked about many times."); return; }
  const what = counted.text === text ? { tokens: counted.tokens } : { text };
  try {
    const told = await json("/v1/estimate", { ...what, keepkv: { method: at("method").value, budget: share() } });
    if (text !== at("text").value) return;
    counted = { text, tokens: told.tokens };
    const part = Math.min(1, told.bytes / told.full_bytes);
    const bar = make("div", { className: "bar" }, make("i"));
    bar.firstChild.style.width = 100 * part + "%";
    box.replaceChildren(make("b", {}, count(told.tokens) + " tokens"), " take at most ", make("b", {}, size(told.bytes)), " of the " + size(told.full_bytes) + " of a full cache.", bar);
    say("write-error", told.peak_bytes > told.limit_bytes ? new Error(`reading this takes ${size(told.peak_bytes)}, and the server has ${size(told.limit_bytes)} for caches`) : null);
  } catch (error) { box.replaceChildren(); say("write-error", error); }
}

// --- reading a document ---
async function compress(event) {
  event.preventDefault();
  if (reading || !at("text").value.trim()) return;
  reading = true;
  at("go").disabled = true;
  at("go").textContent = "Reading …";
  say("write-error");
  try {
    await json("/v1/contexts", { name: own, replace: true, text: at("text").value, keepkv: { method: at("method").value, budget: share() } });
    held = true;
    await show(own);
  } catch (error) { say("write-error", error); }
  reading = false;
  at("go").textContent = "Read and compress";
  at("go").disabled = !at("text").value.trim();
}
async function show(name) {
  const [told, text] = await Promise.all([json("/v1/contexts/" + name), json(`/v1/contexts/${name}/tokens`)]);
  context = name;
  forget();
  at("write").hidden = at("sample").hidden = true;
  at("read").hidden = at("change").hidden = false;
  heat(text.tokens, text.kept);
  receipt(told, text.kept);
  health();
  at("question").focus();
}
// Runs of tokens that as many heads hold are one element, and stand in blocks that are drawn when they are seen.
function heat(tokens, kept) {
  const box = at("heat"), step = (x) => Math.round(x * 20) / 20;
  box.replaceChildren();
  box.classList.toggle("long", tokens.length > 30000);
  for (let start = 0; start < tokens.length; start += 1500) {
    const block = make("p"), end = Math.min(tokens.length, start + 1500);
    for (let i = start; i < end; ) {
      let text = tokens[i], j = i + 1;
      while (j < end && step(kept[j]) === step(kept[i])) text += tokens[j++];
      const run = make("span", {}, text);
      run.style.setProperty("--v", step(kept[i]));
      run.dataset.kept = step(kept[i]);
      block.append(run);
      i = j;
    }
    box.append(block);
  }
}
function receipt(told, kept) {
  const r = told.keepkv.receipt, gone = kept.filter((x) => x === 0).length / Math.max(1, kept.length);
  at("lead").replaceChildren(
    r.compressed ? make("b", {}, `${size(told.bytes)} instead of ${size(told.full_bytes)}.`) : make("b", {}, "Nothing was compressed: the text fits the budget."),
    ` ${count(told.tokens)} tokens were read` + (r.compressed ? `; ${percent(gone)} of them are in no head any more.` : "."));
  const options = Object.entries(r.options || {}).filter(([, x]) => typeof x !== "object").map(([key, x]) => `${key}=${x}`).join(", ");
  const rows = [
    ["method", r.method + (options ? ` (${options})` : "")],
    ["asked for", typeof r.budget === "number" ? (Number.isInteger(r.budget) && r.budget !== 1 ? count(r.budget) + " slots per head" : percent(r.budget) + " of the tokens") : r.budget],
    ["memory", `${size(r.bytes)}, a plain cache takes ${size(r.full_bytes)} (ratio ${r.ratio.toFixed(3)})`],
    ["slots given up", `${count(r.dropped)} dropped` + (r.merged ? `, ${count(r.merged)} merged into others` : "")],
    ["attention given up", r.mass_dropped == null ? "not known" : percent(r.mass_dropped) + " of the last token’s"],
    ["compressions", `${count(r.compressions)}, ${r.seconds.toPrecision(2)} s`],
  ];
  at("receipt").replaceChildren(...rows.map(([name, x]) => make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, x))));
  const layers = Object.entries(r.kept).map(([layer, rows]) => [layer, rows[0]]), seen = r.seen[0] || 1, box = at("heads");
  box.style.gridTemplateColumns = `repeat(${Math.max(1, ...layers.map(([, heads]) => heads.length))}, minmax(2px, 1fr))`;
  box.replaceChildren(...layers.flatMap(([layer, heads]) => heads.map((slots, head) => {
    const cell = make("i");
    cell.style.setProperty("--v", slots / seen);
    cell.dataset.tip = `layer ${layer}, head ${head}: ${count(slots)} slots`;
    return cell;
  })));
  const all = layers.flatMap(([, heads]) => heads);
  const said = all.length ? `Each row is a layer, each cell a KV head: from ${count(Math.min(...all))} to ${count(Math.max(...all))} slots of ${count(seen)} tokens.` : "No layer of this model is compressed.";
  at("heads-note").textContent = said;
  box.ariaLabel = said;
}
// The server need not keep what this page read for longer than it is looked at.
function release() {
  if (!held) return;
  held = false;
  const key = sessionStorage.getItem("key");
  fetch("/v1/contexts/" + own, { method: "DELETE", keepalive: true, headers: key ? { Authorization: "Bearer " + key } : {} }).then(health, () => {});
}
function another() {
  release();
  context = null;
  forget();
  at("read").hidden = at("change").hidden = true;
  at("write").hidden = at("sample").hidden = false;
  at("text").focus();
  others();
}
async function others() {
  const list = (await json("/v1/contexts")).data.filter((one) => !one.name.startsWith("page-") && !one.problem), select = at("open");
  select.hidden = !list.length;
  select.replaceChildren(make("option", { value: "" }, "Open …"), ...list.map((one) => make("option", { value: one.name }, `${one.name} (${count(one.tokens)} tokens)`)));
}

// --- the chat ---
function forget() {
  turns = [];
  running?.abort();
  at("clear").hidden = true;
  const hint = make("div", { className: "empty" }, context ? "Ask about the document. Each question is read behind what was kept of it." : "Ask the model, or give it a document first.");
  if (context && at("text").value === given.document) {
    for (const question of given.questions) hint.append(make("button", { className: "link", type: "button", onclick: () => send(question) }, question));
  }
  at("log").replaceChildren(hint);
}
function entry(kind, text) {
  const said = make("div", { className: "said " + kind }, text), line = make("div", {}, make("span", { className: "unseen" }, kind === "user" ? "You: " : "Model: "), said);
  at("log").append(line);
  return [line, said];
}
async function send(question) {
  question = question.trim();
  if (!question || running) return;
  at("log").querySelector(".empty")?.remove();
  const earlier = at("turns").checked ? turns.slice() : [], user = { role: "user", content: question };
  entry("user", question);
  const [line, said] = entry("reply", "");
  at("question").value = "";
  at("clear").hidden = false;
  say("ask-error");
  running = new AbortController();
  at("send").textContent = "Stop";
  const start = performance.now();
  let first = null, usage = null;
  try {
    const body = { messages: [...earlier, user], stream: true, stream_options: { include_usage: true }, temperature: 0, max_tokens: given.max_tokens };
    if (context) body.keepkv = { context };
    for await (const event of events(await call("/v1/chat/completions", body))) {
      if (event.error) throw new Error(event.error.message);
      const text = event.choices[0]?.delta?.content;
      if (text) { first ??= performance.now() - start; said.textContent += text; at("log").scrollTop = 1e9; }
      usage = event.usage || usage;
    }
  } catch (error) {
    if (error.name !== "AbortError") say("ask-error", error);
  }
  said.textContent = said.textContent.trim();
  if (said.textContent) turns.push(user, { role: "assistant", content: said.textContent });
  if (usage) {
    const cached = usage.prompt_tokens_details.cached_tokens;
    const read = cached ? `${count(usage.prompt_tokens - cached)} tokens read behind ${count(cached)} of the document` : `${count(usage.prompt_tokens)} tokens read`;
    line.append(make("small", {}, `${read}; first word after ${(((first ?? 0)) / 1000).toFixed(2)} s`));
  } else if (!said.textContent) line.remove();
  running = null;
  at("send").textContent = "Send";
  at("question").focus();
  at("log").scrollTop = 1e9;
}
async function* events(answer) {
  const words = new TextDecoder(), reader = answer.body.getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (held + words.decode(value, { stream: true })).split("\n\n");
    held = parts.pop();
    for (const part of parts) if (part !== "data: [DONE]") yield JSON.parse(part.slice(6));
  }
}

// --- what a reader does ---
at("text").addEventListener("input", estimate);
at("budget").addEventListener("input", estimate);
at("method").addEventListener("change", estimate);
at("write").addEventListener("submit", compress);
at("change").addEventListener("click", another);
at("clear").addEventListener("click", () => { forget(); at("question").focus(); });
at("sample").addEventListener("click", () => { at("text").value = given.document; estimate(); at("go").focus(); });
at("open").addEventListener("change", () => { if (at("open").value) show(at("open").value).catch((error) => say("write-error", error)); });
at("pick").addEventListener("click", () => at("file").click());
at("file").addEventListener("change", () => take(at("file").files[0]));
at("ask").addEventListener("submit", (event) => { event.preventDefault(); running ? running.abort() : send(at("question").value); });
at("question").addEventListener("keydown", (event) => { if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); if (!running) send(at("question").value); } });
for (const kind of ["dragenter", "dragover"]) addEventListener(kind, (event) => { event.preventDefault(); at("text").classList.add("over"); });
addEventListener("dragleave", (event) => { if (!event.relatedTarget) at("text").classList.remove("over"); });
addEventListener("drop", (event) => {
  event.preventDefault();
  at("text").classList.remove("over");
  if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
  else if (event.dataTransfer.getData("text")) { at("text").value = event.dataTransfer.getData("text"); estimate(); }
});
async function take(file) {
  if (!file) return;
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    if (text.includes("\0")) throw new TypeError();
    if (context) another();
    at("text").value = text;
    say("write-error");
    estimate();
  } catch { say("write-error", new Error(`${file.name} is no text in UTF-8; save it as one`)); }
}
addEventListener("pointermove", (event) => {
  const node = event.target, tip = at("tip"), text = node.dataset?.tip || (node.dataset?.kept && (Number(node.dataset.kept) ? `held by ${percent(Number(node.dataset.kept))} of the heads` : "held by no head"));
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  tip.style.transform = `translate(${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px, ${event.clientY + 18}px)`;
});
addEventListener("pagehide", release);

// --- the start ---
async function health() {
  try {
    const told = await (await fetch("/health")).json();
    at("server").textContent = told.status === "running" ? `${size(told.bytes)} of ${size(told.limit)} held` : `server is ${told.status}`;
  } catch { at("server").textContent = "the server does not answer"; }
}
async function start() {
  const { id, keepkv } = (await json("/v1/models")).data[0];
  at("model").textContent = id;
  limit = keepkv.max_budget > 1 ? 1 : keepkv.max_budget;
  at("method").replaceChildren(...keepkv.methods.map((name) => make("option", { value: name }, name)));
  const usual = keepkv.method || (keepkv.methods.includes("many-questions") ? "many-questions" : keepkv.methods[0]);
  at("method").value = usual;
  if (typeof keepkv.budget === "number" && keepkv.budget <= 1) at("budget").value = Math.round(20 * Math.log10(100 * keepkv.budget));
  else at("budget").value = 28;
  if (!keepkv.chat) say("ask-error", new Error("this model has no chat template, so it cannot be chatted with"));
  forget();
  estimate();
  await others();
  document.body.dataset.ready = "yes";
}
health();
setInterval(health, 5000);
start().catch((error) => say("write-error", error));
