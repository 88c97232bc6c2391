// A headless Chromium with WebGPU, through playwright-core, and an eye on what the page asks for and complains about.
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { chromium } from "playwright-core";

const FLAGS = ["--headless=new", "--enable-unsafe-webgpu", "--disable-quic", "--disable-background-networking"];
const PATIENCE_MS = 300_000; // a software device that compiles shaders keeps the page's own drawing waiting
const SOFTWARE = "--use-webgpu-adapter=swiftshader";

// options: {viewport: {width, height}, dark, init: a script to run before the page's own}.
// Gives {context, page, open(), seen: {errors, requests}, close()}.
export async function launch(
  address,
  { viewport = { width: 1280, height: 900 }, dark = false, init, touch = false } = {},
) {
  const profile = fs.mkdtempSync(path.join(os.tmpdir(), "gpt2-tvm-chromium-"));
  const flags = [...FLAGS, ...(process.env.GPT2_TVM_CHROMIUM_FLAGS ?? SOFTWARE).split(" ").filter(Boolean)];
  if (process.getuid?.() === 0) flags.push("--no-sandbox"); // Chromium's sandbox refuses root
  const context = await chromium.launchPersistentContext(profile, {
    executablePath: process.env.CHROMIUM,
    args: flags,
    ignoreDefaultArgs: ["--headless", "--disable-gpu"],
    viewport,
    deviceScaleFactor: 2,
    hasTouch: touch,
    colorScheme: dark ? "dark" : "light",
    reducedMotion: "reduce",
    permissions: ["clipboard-read", "clipboard-write"],
  });
  context.setDefaultTimeout(PATIENCE_MS);
  const seen = { errors: [], requests: [] };
  context.on("request", (request) => seen.requests.push(request.url()));
  context.on("console", (message) => message.type() === "error" && seen.errors.push(message.text()));
  context.on("weberror", (error) => seen.errors.push(String(error.error())));
  if (init) await context.addInitScript(init);
  const open = async (page, query = "") => {
    await page.goto(address + query);
    await page.waitForFunction(() => document.querySelectorAll("#artifact option").length > 0);
  };
  const page = context.pages()[0] ?? (await context.newPage());
  const close = async () => {
    await context.close();
    fs.rmSync(profile, { recursive: true, force: true });
  };
  return { context, page, open, seen, close };
}

export const text = (page, id) => page.locator(`#${id}`).textContent();

// Choose an artifact by its name on the server and press Load.
export async function choose(page, name) {
  await page.locator("#artifact").selectOption(`/artifacts/${name}/`);
  await page.locator("#load").click();
}

// Until the model is ready; throws what the page says instead.
export async function ready(page) {
  await page.waitForFunction(() => globalThis.gpt2?.model || !document.getElementById("problem").hidden);
  const problem = await page.locator("#problem");
  if (await problem.isVisible()) throw new Error(await problem.innerText());
}

// What the alert says, once it is there.
export async function problem(page) {
  await page.locator("#problem").waitFor();
  return (await page.locator("#problem p").innerText()).replace(/\s+/g, " ");
}

export async function idle(page) {
  await page.locator("#stop").waitFor({ state: "hidden" });
  await page.waitForFunction(() => !document.getElementById("write").disabled);
}

// options: {prompt, tokens, greedy, seed, temperature, topP, topK}. Gives the run as the page copies it.
export async function write(page, { prompt, tokens = 128, greedy = true, seed, topK = 0 }) {
  await page.locator(`input[name=mode][value=${greedy ? "greedy" : "sampled"}]`).check();
  if (!greedy) await page.locator("#seed").fill(String(seed));
  if (!greedy) await page.locator("#top-k").fill(String(topK));
  await page.locator("#max-tokens").fill(String(tokens));
  await page.locator("#prompt").fill(prompt);
  await page.locator("#write").click();
  await page.waitForFunction(() => globalThis.gpt2.run?.finish);
  await idle(page);
  const run = await page.evaluate(() => JSON.parse(JSON.stringify(globalThis.gpt2.run)));
  return { ...run, text: (await text(page, "given")) + (await text(page, "made")), status: await text(page, "status") };
}
