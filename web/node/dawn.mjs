// WebGPU in node: Dawn, from npm's package webgpu, and TVM's web runtime on it.
import { createRequire } from "node:module";
import { create, globals } from "webgpu";

// Makes navigator.gpu what it is in a browser. DAWN_OPTIONS: words for Dawn's `create`. -> npm's @mlc-ai/web-runtime
export function dawn() {
  console.log = console.error; // standard output carries results alone
  Object.assign(globalThis, globals);
  const gpu = create((process.env.DAWN_OPTIONS ?? "").split(" ").filter(Boolean));
  Object.defineProperty(globalThis, "navigator", { value: { gpu }, configurable: true });
  return createRequire(import.meta.url)("@mlc-ai/web-runtime");
}
