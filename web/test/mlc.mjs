// node test/mlc.mjs ADDRESS JSON : requests of {"plain": bool, "patience_ms": number, "steps": [[method, ...arguments]]} to web-llm on the page
// of gpt2_tvm.mlc.page, in headless Chromium; what each answered as one line of JSON. CHROMIUM names the browser.
// Methods: complete(prompt, {tokens, stop}), press(prompt, tokens): the same through the form, and reset().
import { launch, text } from "./browser.mjs";

const [address, given] = process.argv.slice(2);
const { plain, patience_ms = 300_000, steps } = JSON.parse(given);

const methods = {
  complete: (page, prompt, options) =>
    page.evaluate(([p, o]) => globalThis.mlc.complete(p, o), [prompt, options]),
  reset: (page) => page.evaluate(() => globalThis.mlc.engine.resetChat()),
  async press(page, prompt, tokens) {
    await page.locator("#prompt").fill(prompt);
    await page.locator("#tokens").fill(String(tokens));
    await page.locator("#complete").click();
    await page.waitForFunction(() => document.getElementById("facts").textContent);
    return { text: await text(page, "text"), facts: await text(page, "facts") };
  },
};

const { page, seen, close } = await launch(address);
await page.goto(address + (plain ? "?plain" : ""));
// A library of another ABI can leave web-llm waiting for ever: then what the page last said is the answer.
const loaded = page.waitForFunction(() => globalThis.mlc, null, { timeout: patience_ms }).catch(() => text(page, "status"));
const stuck = await loaded.then((said) => (typeof said === "string" ? `still loading: ${said}` : undefined));
const problem = stuck ?? (await page.evaluate(() => globalThis.mlc.error));
const answers = [];
if (!problem) for (const [method, ...rest] of steps) answers.push((await methods[method](page, ...rest)) ?? null);
await close();
console.log(JSON.stringify({ problem: problem ?? null, answers, ...seen }));
