// node node/pipelines.mjs FOLDER : what each kernel of an artifact costs to compile on Dawn's device, and how many bytes
// of workgroup memory the browser clears for it -> JSON: {adapter, kernels: [{kernel, cpu_s, wall_s, shared_bytes}]}.
import fs from "node:fs";
import path from "node:path";

import { Gpu, parseKernels, wantedBy } from "../lib/gpu.mjs";
import { dawn } from "./dawn.mjs";

const BYTES = { f32: 4, i32: 4, u32: 4, f16: 2, "vec2<f32>": 8, "vec4<f32>": 16 };

dawn();
const folder = process.argv[2];
const read = (name) => fs.readFileSync(path.join(folder, name), "utf8");
const list = JSON.parse(read("kernels.json"));
const gpu = await Gpu.open(JSON.parse(read("manifest.json")).webgpu, { wants: wantedBy(list) });
const kernels = parseKernels(read("kernels.wgsl"));
for (const { requires, file } of list.variants ?? []) {
  if (gpu.meets(requires)) for (const [name, code] of parseKernels(read(file))) kernels.set(name, code);
}
const found = [];
for (const [entryPoint, code] of kernels) {
  const [used, begin] = [process.cpuUsage(), performance.now()];
  const module = gpu.device.createShaderModule({ code });
  await gpu.until(gpu.device.createComputePipelineAsync({ layout: "auto", compute: { module, entryPoint } }));
  const { user, system } = process.cpuUsage(used);
  const shared = [...code.matchAll(/var<workgroup>\s*\w+\s*:\s*array<(.+?),\s*(\d+)>;/g)];
  const shared_bytes = shared.reduce((total, [, type, count]) => total + (BYTES[type] ?? 4) * Number(count), 0);
  found.push({ kernel: entryPoint, cpu_s: (user + system) / 1e6, wall_s: (performance.now() - begin) / 1e3, shared_bytes });
}
process.stdout.write(JSON.stringify({ adapter: gpu.name, kernels: found }) + "\n", () => process.exit(0));
