// node node/kernel.mjs FILE.wasm ELEMENTS : call the module's function "kernel" with one float32 tensor, zeros at
// first, on Dawn, and write the tensor's bytes to standard output.
import fs from "node:fs";
import { createRequire } from "node:module";
import { create, globals } from "webgpu";

console.log = console.error; // standard output carries the result alone
Object.assign(globalThis, globals);
const gpu = create((process.env.DAWN_OPTIONS ?? "").split(" ").filter(Boolean));
Object.defineProperty(globalThis, "navigator", { value: { gpu }, configurable: true });
const tvmjs = createRequire(import.meta.url)("@mlc-ai/web-runtime");

const [file, elements] = process.argv.slice(2);
const tvm = await tvmjs.instantiate(new Uint8Array(fs.readFileSync(file)).buffer, tvmjs.createPolyfillWASI(), () => {});
const found = await tvmjs.detectGPUDevice();
const faults = [];
found.device.addEventListener("uncapturederror", (event) => faults.push(event.error.message));
tvm.initWebGPU(found.device);
tvm.beginScope();
const device = tvm.webgpu();
const data = tvm.empty([Number(elements)], "float32", device).copyFrom(new Float32Array(Number(elements)));
tvm.systemLib().getFunction("kernel")(data);
const host = tvm.empty([Number(elements)], "float32", tvm.cpu()).copyFrom(data);
await device.sync();
if (faults.length) throw new Error(faults[0]);
process.stdout.write(new Uint8Array(host.toArray().buffer), () => process.exit(0));
