// An artifact in TVM's web runtime: its module, parameters and KV caches.

const INDEX = "params/tensor-cache.json";

// `read` with every file's size and sha256 compared with the manifest's. Throws where they differ.
export function checked(read, manifest) {
  return async (name) => {
    const bytes = await read(name);
    const known = manifest.files[name];
    if (known === undefined) throw new Error(`${name} is not in the manifest`);
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
    const hex = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
    if (hex !== known.sha256) throw new Error(`${name} is damaged: load it again`);
    return bytes;
  };
}

export class Model {
  // source(name): a file of the artifact as an ArrayBuffer, or a promise of one. Throws for a damaged file, and where
  // there is no WebGPU adapter.
  static async load(tvmjs, source) {
    const json = (bytes) => JSON.parse(new TextDecoder().decode(bytes));
    const manifest = json(await source("manifest.json"));
    if (manifest.files["model.wasm"] === undefined) throw new Error("the artifact has no model.wasm: compile it with emcc");
    const read = checked(source, manifest);
    const [kernels, index] = [json(await read("kernels.json")), json(await read(INDEX))];
    const tvm = await tvmjs.instantiate(await read("model.wasm"), tvmjs.createPolyfillWASI(), () => {});
    const gpu = await tvmjs.detectGPUDevice();
    const model = new Model(tvm, gpu, manifest, kernels);
    await model.#fill(read, index);
    return model;
  }

  constructor(tvm, gpu, manifest, kernels) {
    this.tvm = tvm;
    this.adapter = gpu.adapterInfo;
    this.faults = [];
    gpu.device.addEventListener("uncapturederror", (event) => this.faults.push(event.error.message));
    this.manifest = manifest;
    this.kernels = kernels;
    this.position = 0;
    tvm.initWebGPU(gpu.device);
    this.device = tvm.webgpu();
  }

  async #fill(read, index) {
    const { tvm, device } = this;
    tvm.beginScope();
    this.vm = tvm.detachFromCurrentScope(tvm.createVirtualMachine(device));
    await tvm.asyncLoadWebGPUPipelines(this.vm.getInternalModule());
    const tensors = new Map();
    for (const shard of index.records) {
      const bytes = new Uint8Array(await read("params/" + shard.dataPath));
      for (const record of shard.records) {
        const tensor = tvm.empty(record.shape, record.dtype, device);
        tensor.copyFromRawBytes(bytes.subarray(record.byteOffset, record.byteOffset + record.nbytes));
        tensors.set(record.name, tensor);
      }
      await device.sync();
    }
    const params = this.manifest.params.map((name) => tensors.get(name));
    this.params = tvm.detachFromCurrentScope(tvm.makeTVMArray(params));
    const inputs = this.kernels.functions.greedy_b1.inputs;
    const caches = inputs.find(Array.isArray).map(({ shape, dtype }) => tvm.empty(shape, dtype, device));
    this.caches = tvm.detachFromCurrentScope(tvm.makeTVMArray(caches));
    this.functions = {};
    tvm.endScope();
  }

  #function(name) {
    this.functions[name] ??= this.tvm.detachFromCurrentScope(this.vm.getFunction(name));
    return this.functions[name];
  }

  #int(values, shape) {
    return this.tvm.empty(shape, "int32", this.device).copyFrom(Int32Array.from(values));
  }

  // Append a prompt -> the most likely next token.
  async prefill(ids) {
    const { tvm, device } = this;
    tvm.beginScope();
    const at = [this.#int([this.position], [1]), this.#int([ids.length], [1])];
    const logits = this.#function("prefill")(this.#int(ids, [1, ids.length]), ...at, this.caches, this.params);
    const host = tvm.empty(logits.shape, logits.dtype, tvm.cpu()).copyFrom(logits);
    await device.sync();
    const values = host.toArray();
    tvm.endScope();
    this.#check();
    this.position += ids.length;
    return values.reduce((best, value, i) => (value > values[best] ? i : best), 0);
  }

  // `count` tokens after a prompt, each the most likely one. The loop stays on the device: one read-back at the end.
  async greedy(prompt, count) {
    const { tvm, device } = this;
    const first = await this.prefill(prompt);
    const begin = this.position;
    tvm.beginScope();
    const capacity = this.manifest.max_seq_len;
    const state = [
      this.#int([first], [1, 1]),
      this.#int([begin], [1]),
      this.#int(new Int32Array(capacity), [1, capacity]),
      this.#int([1], [1]),
    ];
    const step = this.#function("greedy_b1");
    for (let i = 1; i < count; ++i) {
      tvm.beginScope();
      step(...state, this.caches, this.params);
      tvm.endScope();
    }
    const host = tvm.empty([1, capacity], "int32", tvm.cpu()).copyFrom(state[2]);
    await device.sync();
    const seen = Array.from(host.toArray());
    tvm.endScope();
    this.#check();
    this.position += count - 1;
    return [first, ...seen.slice(begin + 1, begin + count)];
  }

  #check() {
    if (this.faults.length) throw new Error(this.faults[0]);
  }
}
