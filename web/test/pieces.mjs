// node test/pieces.mjs : parts of the page without a browser, for comparison with Python's. Reads a line of JSON
// {part, …} from standard input, writes its answer as JSON.
import fs from "node:fs";
import path from "node:path";
import { fileURLToPath } from "node:url";
import esbuild from "esbuild";

const WEB = path.join(path.dirname(fileURLToPath(import.meta.url)), "..");

const { outputFiles } = await esbuild.build({
  stdin: {
    contents: ["tokenizer", "random", "sampling", "benchmark", "dom"]
      .map((name) => `export * from "./src/${name}";`)
      .join("\n"),
    resolveDir: WEB,
    loader: "ts",
  },
  bundle: true,
  format: "esm",
  platform: "node",
  write: false,
});
const encoded = Buffer.from(outputFiles[0].contents).toString("base64");
const page = await import(`data:text/javascript;base64,${encoded}`);

// A `Files` over a folder, unchecked.
function files(folder) {
  const at = (name) => path.join(folder, name);
  return {
    has: (name) => fs.existsSync(at(name)),
    read: async (name) => fs.readFileSync(at(name)),
    json: async (name) => JSON.parse(fs.readFileSync(at(name), "utf8")),
  };
}

const parts = {
  async tokens({ folder, texts }) {
    const tokenizer = await page.Tokenizer.open(files(folder));
    const back = (ids) => {
      const stream = tokenizer.stream();
      return [...ids.map((id) => stream.push(id)), stream.finish()];
    };
    return {
      end: tokenizer.end,
      texts: texts.map((text) => ({ ids: tokenizer.encode(text), pieces: back(tokenizer.encode(text)) })),
    };
  },
  async pieces({ folder, ids }) {
    const stream = (await page.Tokenizer.open(files(folder))).stream();
    return [...ids.map((id) => stream.push(id)), stream.finish()];
  },
  async random({ seeds, count }) {
    return seeds.map((seed) => {
      const random = new page.Random(seed);
      return Array.from({ length: count }, () => random.next());
    });
  },
  async distribution({ cases }) {
    const from = (value) => (value === "-inf" ? -Infinity : value);
    return cases.map(({ logits, temperature, topK, topP }) =>
      page.distribution(Float32Array.from(logits, from), { temperature, topK, topP }),
    );
  },
  async sample({ logits, seed, count, temperature, topK, topP }) {
    const random = new page.Random(seed);
    return Array.from({ length: count }, () =>
      page.sample(Float32Array.from(logits), { temperature, topK, topP }, random),
    );
  },
  async prompt({ folder, vocabulary, n }) {
    const tokenizer = folder === null ? null : await page.Tokenizer.open(files(folder));
    return page.promptFor(tokenizer, vocabulary, n);
  },
  async summary({ values }) {
    return page.summary(values);
  },
};

const { part, ...given } = JSON.parse(fs.readFileSync(0, "utf8"));
process.stdout.write(JSON.stringify(await parts[part](given)));
