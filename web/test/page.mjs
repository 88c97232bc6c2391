// node test/page.mjs SCENARIO ADDRESS FOLDER [JSON] : a person at the page, in headless Chromium; what was seen as one line of JSON.
// FOLDER takes the screenshots. CHROMIUM names the browser.
import fs from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";

import { choose, idle, launch, problem, ready, text, write } from "./browser.mjs";

const AXE = fs.readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const SIZES = { desktop: { width: 1280, height: 900 }, phone: { width: 375, height: 812 } };
const [scenario, address, folder, given] = process.argv.slice(2);

// Screenshots of the whole page in both sizes and both colour schemes, what axe-core finds, and what does not fit.
async function look(page, name) {
  const found = { violations: [], tooWide: [] };
  for (const [size, viewport] of Object.entries(SIZES)) {
    await page.setViewportSize(viewport);
    for (const colorScheme of ["light", "dark"]) {
      await page.emulateMedia({ colorScheme });
      await page.evaluate(() => scrollTo(0, 0));
      await page.screenshot({ path: path.join(folder, `${name}-${size}-${colorScheme}.png`), fullPage: true });
      const { violations } = await page.evaluate(`(() => { ${AXE}; return axe.run(); })()`);
      const told = ({ id, nodes }) =>
        `${name}, ${size}, ${colorScheme}: ${id} (${nodes.map((node) => node.target).join(", ")})`;
      found.violations.push(...violations.map(told));
      const wider = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
      if (wider > 0) found.tooWide.push(`${name}, ${size}: by ${wider} pixels`);
    }
  }
  await page.setViewportSize(SIZES.desktop);
  await page.emulateMedia({ colorScheme: "light" });
  return found;
}

// Random weights repeat themselves unless chance helps.
const jane = (page, tokens) => write(page, { prompt: "Dear Jane,", tokens, greedy: false, seed: 3 });

const paths = (seen) => seen.requests.map((url) => new URL(url).pathname);

const scenarios = {
  // The trained model: greedy ids and logits, sampling, stopping, a warm reload.
  async story({ artifact, prompt, tokens, probes, sampled }) {
    const browser = await launch(address);
    const { page, seen } = browser;
    await browser.open(page);
    const before = await look(page, "empty");
    await choose(page, artifact);
    await ready(page);
    const greedy = await write(page, { prompt, tokens });
    const after = await look(page, "written");
    const logits = [];
    for (const ids of probes) {
      logits.push(
        await page.evaluate(async (ids) => {
          globalThis.gpt2.model.reset();
          return Array.from(await globalThis.gpt2.model.prefill(ids));
        }, ids),
      );
    }
    const chance = await write(page, { prompt, greedy: false, ...sampled });

    await page.reload(); // everything is kept by now, and the tab remembers what it had
    seen.requests.length = 0;
    await ready(page);
    const warm = { stage: await text(page, "stage"), requests: paths(seen) };
    const runs = [];
    for (let i = 0; i < 4; ++i) runs.push(await write(page, { prompt, tokens: 1 }));
    warm.first_token_ms = runs[0].first_token_time_us / 1e3;
    warm.prefill_ms = runs.slice(1).map((run) => run.prefill_time_us / 1e3);
    const stage = await text(page, "device-summary");
    await browser.close();
    return { greedy, logits, chance, warm, stage, looks: [before, after], ...seen };
  },

  // A keyboard alone, Stop and Go on, copying, the benchmark, ids instead of text, inputs out of range.
  async hands({ artifact, plain }) {
    const browser = await launch(address, { touch: true });
    const { page, seen } = browser;
    await browser.open(page, `?artifact=/artifacts/${artifact}/`);
    await page.locator("#artifact").focus();
    await page.keyboard.press("Tab");
    await page.keyboard.press("Enter"); // Load
    await ready(page);
    await page.locator("#max-tokens").fill("400");
    await page.locator("#prompt").fill("Dear Jane,");
    await page.keyboard.press("Control+Enter");
    await page.waitForFunction(() => globalThis.gpt2.run?.ids.length > 3);
    await page.keyboard.press("Escape");
    await idle(page);
    const stopped = {
      status: await text(page, "status"),
      tokens: await page.evaluate(() => globalThis.gpt2.run.ids.length),
    };
    const before = await text(page, "made");
    await page.locator("#max-tokens").fill("5");
    await page.locator("#further").click();
    await idle(page);
    const further = { before, after: await text(page, "made"), prompt: await text(page, "prompt-tokens") };
    const clipboard = async (id) => {
      await page.locator(`#${id}`).click();
      return await page.evaluate(() => navigator.clipboard.readText());
    };
    const copied = {
      text: await clipboard("copy-text"),
      run: JSON.parse(await clipboard("copy-run")),
      shown: (await text(page, "given")) + (await text(page, "made")),
    };
    await page.locator("#benchmark").click();
    await page.locator("#benchmark-result").waitFor();
    const benchmark = {
      json: JSON.parse(await clipboard("copy-json")),
      shown: await text(page, "bench-decode"),
      status: await text(page, "benchmark-status"),
    };
    const looks = [await look(page, "measured")];
    const problems = {};
    for (const [id, value] of [
      ["max-tokens", "0"],
      ["prompt", ""],
      ["prompt", "word ".repeat(600)],
    ]) {
      const was = await page.locator(`#${id}`).inputValue();
      await page.locator(`#${id}`).fill(value);
      await page.locator("#write").click();
      problems[`${id} ${value.slice(0, 4)}`] = await problem(page);
      await page.locator(`#${id}`).fill(was);
      await write(page, { prompt: "Jane", tokens: 2 });
      if (await page.locator("#problem").isVisible()) problems.stays = true;
    }
    await choose(page, plain);
    await ready(page);
    const ids = await write(page, { prompt: "1, 2 3", tokens: 4 });
    await browser.close();
    return { stopped, further, copied, benchmark, problems, ids, looks, ...seen };
  },

  // Files that are damaged or missing, and what helps.
  async files({ good, damaged, missing, f16 }) {
    const browser = await launch(address);
    const { page, seen, context } = browser;
    await browser.open(page);
    const said = {};
    for (const [name, artifact] of Object.entries({ damaged, missing, f16, gone: null })) {
      if (artifact === null) {
        await page.locator("#artifact").selectOption("");
        await page.locator("#address").fill("/artifacts/nobody/");
        await page.locator("#load").click();
      } else await choose(page, artifact);
      said[name] = await problem(page);
      if (name === "damaged") said.look = await look(page, "damaged");
      said[`${name} again`] = await page.locator("#again").isVisible();
    }
    await page.locator("#address").fill("https://example.org/model/");
    await page.locator("#load").click();
    said.elsewhere = await problem(page);
    await choose(page, good);
    await ready(page);
    const fine = await jane(page, 3);

    // One byte of the shard changed on its way; then as it is.
    const errors = [...seen.errors];
    await page.locator("#forget").click();
    await page.locator("#forget").waitFor({ state: "hidden" });
    const [shard] = await page.evaluate(() =>
      Object.keys(globalThis.gpt2.model.manifest.files).filter((name) => name.endsWith(".bin")),
    );
    await context.route(`**/${shard}`, async (route) => {
      const response = await route.fetch();
      const body = await response.body();
      body[body.length >> 1] ^= 1;
      await route.fulfill({ response, body });
    });
    await page.locator("#load").click();
    said.onTheWay = await problem(page);
    await context.unroute(`**/${shard}`);
    seen.requests.length = 0;
    await page.locator("#again").click();
    await ready(page);
    const again = { requests: paths(seen), tokens: (await jane(page, 3)).ids };

    // A file that was damaged after it had been kept: dropped, and loaded from the server unasked.
    await page.evaluate(
      async (sha256) => {
        const cache = await caches.open("gpt2-tvm");
        const [request] = (await cache.keys()).filter(({ url }) => url.endsWith(sha256));
        const bytes = new Uint8Array(await (await cache.match(request)).arrayBuffer());
        bytes[7] ^= 1;
        await cache.put(request, new Response(bytes));
      },
      await page.evaluate((shard) => globalThis.gpt2.model.manifest.files[shard].sha256, shard),
    );
    seen.requests.length = 0;
    await page.locator("#load").click();
    await page.waitForFunction(() => globalThis.gpt2.model === null);
    await ready(page);
    const kept = { requests: paths(seen), tokens: (await jane(page, 3)).ids };
    await browser.close();
    return { said, tokens: fine.ids, again, kept, requests: seen.requests, errors };
  },

  // What the browser lacks, in words.
  async lacks({ artifact }) {
    const said = {};
    const inits = {
      nothing: () => delete Navigator.prototype.gpu,
      adapter: () => (GPU.prototype.requestAdapter = async () => null),
      binding: () => {
        const { get } = Object.getOwnPropertyDescriptor(GPUAdapter.prototype, "limits");
        Object.defineProperty(GPUAdapter.prototype, "limits", {
          get() {
            const real = get.call(this);
            return new Proxy(real, { get: (_, name) => (name === "maxStorageBufferBindingSize" ? 65536 : real[name]) });
          },
        });
      },
    };
    const errors = [];
    for (const [name, init] of Object.entries(inits)) {
      const browser = await launch(address, { init });
      await browser.open(browser.page);
      if (name === "binding") await choose(browser.page, artifact);
      said[name] = await problem(browser.page);
      said[`${name} again`] = await browser.page.locator("#again").isVisible();
      if (name === "nothing") said.looks = [await look(browser.page, "lacks")];
      errors.push(...browser.seen.errors);
      await browser.close();
    }
    return { said, errors };
  },

  // device.destroy() while a text is written, and while nothing goes on.
  async lost({ artifact }) {
    const init = () => {
      const request = GPUAdapter.prototype.requestDevice;
      globalThis.devices = [];
      GPUAdapter.prototype.requestDevice = async function (...given) {
        const device = await request.apply(this, given);
        globalThis.devices.push(device);
        return device;
      };
    };
    const browser = await launch(address, { init });
    const { page } = browser;
    await browser.open(page);
    await choose(page, artifact);
    await ready(page);
    const expected = (await jane(page, 6)).ids;
    const rounds = [];
    for (const writing of [false, true]) {
      if (writing) {
        await page.locator("#max-tokens").fill("400");
        await page.locator("#write").click();
        await page.waitForFunction(() => globalThis.gpt2.run?.finish === null && globalThis.gpt2.run.ids.length > 2);
      }
      await page.evaluate(() => globalThis.devices.at(-1).destroy());
      const said = await problem(page);
      const disabled = await page.locator("#write").isDisabled();
      await page.locator("#again").click();
      await page.waitForFunction(() => globalThis.gpt2.model !== null);
      const gone = await page.locator("#problem").isHidden();
      rounds.push({ said, disabled, gone, ids: (await jane(page, 6)).ids });
    }
    await browser.close();
    return { expected, rounds };
  },

  // A reload in the middle of loading goes on, and two tabs load and write side by side.
  async tabs({ artifact }) {
    const browser = await launch(address);
    const { page, seen, context } = browser;
    await browser.open(page);
    let held;
    const shard = new Promise((resolve) => (held = resolve));
    await context.route("**/*.bin", held);
    await choose(page, artifact);
    await (await shard).abort().catch(() => {}); // the shard was asked for: everything before it is kept
    await page.waitForFunction(async () => (await (await caches.open("gpt2-tvm")).keys()).length > 1);
    await problem(page); // an aborted request is a server that went away
    await page.locator("#again").click();
    await page.locator("#loading").waitFor();
    await context.unroute("**/*.bin");
    await page.reload();
    const asked = paths(seen);
    seen.requests.length = 0;
    await ready(page);
    const resumed = { before: asked, after: paths(seen), stage: await text(page, "stage") };

    await page.locator("#forget").click();
    seen.requests.length = 0;
    const other = await context.newPage();
    await browser.open(other);
    await Promise.all([page.locator("#load").click(), choose(other, artifact)]);
    await page.waitForFunction(() => globalThis.gpt2.model === null);
    await Promise.all([ready(page), ready(other)]);
    const together = paths(seen);
    const [a, b] = await Promise.all([jane(page, 12), jane(other, 12)]);
    await browser.close();
    return { resumed, together, ids: [a.ids, b.ids], errors: seen.errors, requests: seen.requests };
  },
};

try {
  const seen = await scenarios[scenario](given ? JSON.parse(given) : {});
  process.stdout.write(JSON.stringify(seen) + "\n", () => process.exit(0));
} catch (error) {
  console.error(error.stack);
  process.exit(1);
}
