// node node/greedy.mjs ARTIFACT ID,ID,... N : N tokens of the compiled model after a prompt of ids, each the most
// likely one, on Dawn (npm's webgpu). Prints one JSON line: ids, adapter, milliseconds; an error as one line on stderr.
import fs from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import { create, globals } from "webgpu";

import { Model } from "../lib/model.mjs";

console.log = console.error; // standard output carries the result alone
Object.assign(globalThis, globals);
const gpu = create((process.env.DAWN_OPTIONS ?? "").split(" ").filter(Boolean));
Object.defineProperty(globalThis, "navigator", { value: { gpu }, configurable: true });
const tvmjs = createRequire(import.meta.url)("@mlc-ai/web-runtime");

const [artifact, prompt, count] = process.argv.slice(2);
const read = (name) => {
  const bytes = fs.readFileSync(path.join(artifact, name));
  return bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength);
};

try {
  const begin = performance.now();
  const model = await Model.load(tvmjs, read);
  const loaded = performance.now();
  const ids = await model.greedy(prompt.split(",").map(Number), Number(count));
  const { vendor, architecture, description } = model.adapter;
  const milliseconds = { load: loaded - begin, generate: performance.now() - loaded };
  const line = JSON.stringify({ ids, adapter: [vendor, architecture, description], milliseconds });
  process.stdout.write(line + "\n", () => process.exit(0)); // Dawn would keep the process alive
} catch (error) {
  console.error(error.message);
  process.exit(1);
}
