// node node/kernel.mjs FILE.wasm ELEMENTS : call the module's function "kernel" with one float32 tensor, zeros at
// first, on Dawn, and write the tensor's bytes to standard output.
import fs from "node:fs";

import { Gpu } from "../lib/gpu.mjs";
import { dawn } from "./dawn.mjs";

const tvmjs = dawn();
const [file, elements] = process.argv.slice(2);
const tvm = await tvmjs.instantiate(new Uint8Array(fs.readFileSync(file)).buffer, tvmjs.createPolyfillWASI(), () => {});
const gpu = await Gpu.open();
tvm.initWebGPU(gpu.device);
tvm.beginScope();
const device = tvm.webgpu();
const data = tvm.empty([Number(elements)], "float32", device).copyFrom(new Float32Array(Number(elements)));
tvm.systemLib().getFunction("kernel")(data);
const host = tvm.empty([Number(elements)], "float32", tvm.cpu()).copyFrom(data);
await gpu.until(device.sync());
process.stdout.write(new Uint8Array(host.toArray().buffer), () => process.exit(0));
