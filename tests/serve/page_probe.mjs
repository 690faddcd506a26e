// Uses the page as a person with a keyboard does, and prints what was seen as JSON.
// node page_probe.mjs URL CHROMIUM FOLDER [AXE]: needs playwright-core; pictures go into FOLDER.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
const { chromium } = createRequire(import.meta.url)(process.env.PLAYWRIGHT_CORE || "playwright-core");
const [url, executablePath, folder, axe] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const problems = [], found = { wide: {}, axe: {} };
const slow = { timeout: 120000 };

async function open(colorScheme, width) {
  const page = await browser.newPage({ colorScheme, viewport: { width, height: 860 } });
  await page.addInitScript(() => { window.setInterval = () => 0; });  // what is told must not wait for the next look
  page.on("console", (message) => message.type() === "error" && problems.push(message.text()));
  page.on("pageerror", (error) => problems.push(error.message));
  page.on("request", (request) => request.url().startsWith(url) || request.url().startsWith("data:") || problems.push("fetches " + request.url()));
  await page.goto(url);
  await page.waitForSelector("body[data-ready]", slow);
  return page;
}
async function look(page, name) {
  await page.screenshot({ path: `${folder}/${name}.png`, fullPage: true });
  found.wide[name] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
  if (!axe) return;
  await page.evaluate(readFileSync(axe, "utf8"));
  found.axe[name] = await page.evaluate(async () => {
    const { violations } = await axe.run(document, { resultTypes: ["violations"] });
    return violations.filter(({ impact }) => impact === "serious" || impact === "critical").map(({ id, nodes }) => [id, nodes[0].html.slice(0, 160)]);
  });
}
const idle = (page) => page.waitForFunction(() => document.getElementById("send").textContent === "Send" && document.querySelector("#log small"), null, slow);
const focused = (page) => page.evaluate(() => document.activeElement.id);

for (const [name, scheme, width] of [["light", "light", 1280], ["dark", "dark", 1280], ["phone", "light", 400], ["phone-dark", "dark", 400]]) {
  const page = await open(scheme, width);
  if (name === "light") found.first = await page.evaluate(() => ({ disabled: document.getElementById("go").disabled, methods: document.getElementById("method").options.length }));
  await page.focus("#sample");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => /tokens/.test(document.getElementById("cost").textContent), null, slow);
  await look(page, name + "-write");
  if (name === "light") {
    found.cost = [await page.textContent("#cost")];
    await page.focus("#budget");
    for (let i = 0; i < 10; i++) await page.keyboard.press("ArrowLeft");
    await page.waitForFunction((before) => document.getElementById("cost").textContent !== before, found.cost[0], slow);
    found.cost.push(await page.textContent("#cost"));
    for (let i = 0; i < 16; i++) await page.keyboard.press("ArrowRight");
    await page.focus("#go");
  }
  await page.keyboard.press("Enter");
  await page.waitForSelector("#read:not([hidden])", slow);
  found.focus = await focused(page);
  const question = await page.textContent("#log .empty button");
  await page.keyboard.type(question);
  await page.keyboard.press("Enter");
  await idle(page);
  if (name === "light") {
    Object.assign(found, await page.evaluate(() => ({
      runs: [...document.querySelectorAll("#heat span")].map((run) => [run.textContent, Number(run.dataset.kept)]),
      receipt: Object.fromEntries([...document.querySelectorAll("#receipt tr")].map((row) => [row.cells[0].textContent, row.cells[1].textContent])),
      heads: document.querySelectorAll("#heads i").length, note: document.getElementById("heads-note").textContent,
      lead: document.getElementById("lead").textContent, line: document.querySelector("#log small").textContent,
    })));
    found.held = await page.waitForFunction(() => /^[1-9].* held/.test(document.getElementById("server").textContent), null, { timeout: 2000 }).then(() => true, () => false);
    found.question = question;
    found.reply = await page.textContent("#log .reply");
  }
  await look(page, name + "-read");
  if (name === "light") {
    await page.click("#change");
    await page.setInputFiles("#file", { name: "a.bin", mimeType: "application/octet-stream", buffer: Buffer.from([255, 254, 0, 1]) });
    await page.waitForFunction(() => document.getElementById("write-error").textContent, null, slow);
    found.binary = await page.textContent("#write-error");
    await page.setInputFiles("#file", { name: "a.txt", mimeType: "text/plain", buffer: Buffer.from("Äther is a text. ") });
    await page.waitForFunction(() => document.getElementById("text").value.startsWith("Äther"), null, slow);
    found.unlabelled = await page.evaluate(() => [...document.querySelectorAll("input, select, textarea, button")].filter((x) => x.type !== "file" && !(x.labels?.length || x.textContent.trim() || x.ariaLabel)).map((x) => x.id));
  }
  await page.close();
}
await browser.close();
console.log(JSON.stringify({ ...found, problems }));
