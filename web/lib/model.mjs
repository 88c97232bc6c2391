// An artifact in TVM's web runtime: its module, parameters and KV cache, for one sequence.

import { Files } from "./files.mjs";
import { Gpu, parseKernels, wantedBy } from "./gpu.mjs";

const MODULE = "model.wasm";
const KERNELS = "kernels.json";
const SOURCES = "kernels.wgsl";
const ONE_TEXT = ["prefill", "decode_b1", "greedy_b1"]; // what this file calls; other functions compile when called
const INDEX = "params/tensor-cache.json";
const [TOKEN, HISTORY] = [0, 2]; // inputs of greedy_b1: token, position, history, active

export { FileError, Files, fetchFrom } from "./files.mjs";
export { DeviceLost, Gpu, Unsupported } from "./gpu.mjs";

function argmax(values) {
  let best = 0;
  for (let i = 1; i < values.length; ++i) if (values[i] > values[best]) best = i;
  return best;
}

// Of functions' launches, the kernels that take some buffer in windows -> see Gpu.bindInWindows.
function windowsOf(functions) {
  const found = new Map();
  for (const { kernel, buffers } of Object.values(functions).flatMap(({ launches }) => launches)) {
    if (found.has(kernel) || !buffers.some(([kind]) => kind === "window")) continue;
    const bindings = [];
    let last = null; // the tensor whose windows came last
    for (const [kind, ref, offset, size] of buffers) {
      const of = kind === "window" && JSON.stringify(ref);
      if (kind !== "window") bindings.push(null);
      else if (of === last && offset > 0) bindings.at(-1).push({ offset, size });
      else bindings.push([{ offset, size }]);
      last = of;
    }
    found.set(kernel, bindings);
  }
  return found;
}

export class Model {
  // tvmjs: npm's @mlc-ai/web-runtime. read: see Files. onProgress({stage, done, total}): stage "files" counts bytes,
  // "shaders" the pipelines that are ready; the two go on together. timestamps: see Gpu.open.
  // Throws FileError, Unsupported or DeviceLost; nothing is kept on the device then.
  static async load(tvmjs, read, { onProgress = () => {}, timestamps = false } = {}) {
    const files = await Files.open(read);
    const { manifest } = files;
    if (!files.has(MODULE)) throw new Error(`this artifact has no ${MODULE}: compile it where emcc is installed`);
    if (!manifest.batch_sizes.includes(1)) throw new Error("this artifact has no batch of 1: compile it with --batch-sizes 1");
    const kernels = await files.json(KERNELS);
    const gpu = await Gpu.open(manifest.webgpu, { timestamps, wants: wantedBy(kernels) });
    let model;
    try {
      // other versions of some kernels, for adapters like this one; the last that fits wins
      const variants = (kernels.variants ?? []).filter(({ requires }) => gpu.meets(requires)).map(({ file }) => file);
      const windows = windowsOf(kernels.functions);
      const sources = [...(windows.size ? [SOURCES] : []), ...variants];
      const names = Object.keys(manifest.files).filter((name) => name.startsWith("params/"));
      const total = files.size([MODULE, ...sources, ...names]);
      let done = 0;
      const onBytes = (count) => onProgress({ stage: "files", done: (done += count), total });
      gpu.bindInWindows(windows);
      for (const file of sources) {
        gpu.replaceKernels(parseKernels(new TextDecoder().decode(await files.read(file, onBytes))));
      }
      const module = await files.read(MODULE, onBytes);
      const tvm = await tvmjs.instantiate(module, tvmjs.createPolyfillWASI(), () => {});
      model = new Model(tvm, gpu, manifest, kernels);
      await gpu.until(model.#fill(files, onBytes, onProgress));
      return model;
    } catch (error) {
      (model ?? gpu).dispose();
      throw gpu.lost ?? error;
    }
  }

  #busy = false;
  #functions = {};
  #state;

  constructor(tvm, gpu, manifest, kernels) {
    this.tvm = tvm;
    this.gpu = gpu;
    this.manifest = manifest;
    this.kernels = kernels;
    this.capacity = manifest.max_seq_len; // tokens that the cache holds
    this.vocabulary = manifest.config.vocab_size;
    this.position = 0; // tokens in the cache
    this.next = null; // the most likely token after them, once logits were made
    tvm.initWebGPU(gpu.device);
    this.device = tvm.webgpu();
  }

  async #fill(files, onBytes, onProgress) {
    const { tvm } = this;
    this.vm = this.#scope(() => tvm.detachFromCurrentScope(tvm.createVirtualMachine(this.device)));
    tvm.registerInitProgressCallback((report) => onProgress({ stage: "shaders", done: report.progress, total: 1 }));
    const shaders = tvm.asyncLoadWebGPUPipelines(this.#ofOneText(this.vm.getInternalModule()));
    shaders.catch(() => {}); // awaited below, after the weights
    this.params = await this.#weights(files, onBytes);
    const inputs = this.kernels.functions.greedy_b1.inputs;
    this.#scope(() => {
      const empty = ({ shape, dtype }) => tvm.empty(shape, dtype, this.device);
      this.caches = tvm.detachFromCurrentScope(tvm.makeTVMArray(inputs.find(Array.isArray).map(empty)));
      this.#state = inputs.filter((input) => !Array.isArray(input)).map((input) => tvm.detachFromCurrentScope(empty(input)));
    });
    await shaders;
    await this.device.sync();
  }

  // The module, with no kernels but those of ONE_TEXT in its list: the runtime compiles the others when they are called.
  #ofOneText(module) {
    const { functions } = this.kernels;
    const launches = ONE_TEXT.filter((name) => name in functions).flatMap((name) => functions[name].launches);
    const wanted = new Set(launches.map(({ kernel }) => kernel));
    const list = (text) => JSON.stringify(Object.fromEntries(Object.entries(JSON.parse(text)).filter(([name]) => wanted.has(name))));
    return {
      getFunction: (name, ...more) => {
        const found = module.getFunction(name, ...more);
        return name === "webgpu.get_fmap" ? () => list(found()) : found;
      },
    };
  }

  async #weights(files, onBytes) {
    const { tvm, device, manifest } = this;
    const tensors = new Map();
    const { records: shards } = await files.json(INDEX, onBytes);
    const read = (k) => (k < shards.length ? files.read(`params/${shards[k].dataPath}`, onBytes) : Promise.resolve(null));
    let coming = read(0);
    for (let k = 0; k < shards.length; ++k) {
      const bytes = new Uint8Array(await coming);
      coming = read(k + 1); // while this one is copied
      coming.catch(() => {});
      this.#scope(() => {
        for (const { name, shape, dtype, byteOffset, nbytes } of shards[k].records) {
          const tensor = tvm.detachFromCurrentScope(tvm.empty(shape, dtype, device));
          tensor.copyFromRawBytes(bytes.subarray(byteOffset, byteOffset + nbytes));
          tensors.set(name, tensor);
        }
      });
      await device.sync();
    }
    return this.#scope(() => {
      const params = tvm.detachFromCurrentScope(tvm.makeTVMArray(manifest.params.map((name) => tensors.get(name))));
      for (const tensor of tensors.values()) tensor.dispose(); // the array holds them
      return params;
    });
  }

  // Synchronous work whose temporary objects go away at its end.
  #scope(action) {
    this.tvm.beginScope();
    try {
      return action();
    } finally {
      this.tvm.endScope();
    }
  }

  // An exported function; it stays loaded.
  function(name) {
    return (this.#functions[name] ??= this.#scope(() => this.tvm.detachFromCurrentScope(this.vm.getFunction(name))));
  }

  #int(values, shape) {
    return this.tvm.empty(shape, "int32", this.device).copyFrom(Int32Array.from(values));
  }

  // Runs `action`, one at a time. Throws DeviceLost, and what WebGPU reports.
  async #alone(action) {
    this.#enter();
    try {
      return await this.gpu.until(action());
    } finally {
      this.#busy = false;
    }
  }

  #enter() {
    this.gpu.check();
    if (this.#busy) throw new Error("the model is busy with another text");
    this.#busy = true;
  }

  #room(count) {
    if (this.position + count > this.capacity) {
      const total = this.position + count;
      throw new Error(`the text would be ${total} tokens long, this model holds ${this.capacity}: start anew, or write less`);
    }
  }

  reset() {
    this.rewind(0);
  }

  // Forget all but the first `position` tokens.
  rewind(position) {
    if (!(position >= 0 && position <= this.position)) throw new Error(`cannot go back to ${position}`);
    this.position = position;
    this.next = null;
  }

  // Append a prompt -> a Float32Array, the logits after its last token.
  prefill(ids) {
    return this.#logits("prefill", ids);
  }

  // Append one token -> a Float32Array, the logits after it.
  decode(id) {
    return this.#logits("decode_b1", [id]);
  }

  #logits(name, ids) {
    const wrong = ids.find((id) => !Number.isInteger(id) || id < 0 || id >= this.vocabulary);
    if (ids.length === 0) throw new Error("the prompt is empty");
    if (wrong !== undefined) throw new Error(`token ${wrong} is outside the vocabulary of ${this.vocabulary}`);
    this.#room(ids.length);
    return this.#alone(async () => {
      const host = this.#scope(() => {
        const at = [this.#int([this.position], [1]), this.#int([ids.length], [1])];
        return this.#fetch(this.function(name)(this.#int(ids, [1, ids.length]), ...at, this.caches, this.params));
      });
      await this.device.sync();
      const values = host.toArray();
      host.dispose();
      this.position += ids.length;
      this.next = argmax(values);
      return values;
    });
  }

  // The most likely tokens, each appended, `count` of them as they come. The step after a token is under way before the
  // token is handed out, and what comes back from the device is that token alone. Left early, exactly the tokens that
  // were handed out are appended.
  async *greedy(count) {
    this.#begin(count);
    let [token, coming] = [this.next, null];
    try {
      for (let k = 0; k < count; ++k) {
        const found = coming;
        coming = this.#step(); // appends this token and finds the next
        if (found !== null) token = await this.gpu.until(found);
        this.position += 1;
        this.next = null;
        yield token;
      }
      if (coming !== null) this.next = await this.gpu.until(coming);
    } finally {
      if (this.next === null && coming !== null) this.next = await coming.catch(() => null); // left early, or lost
      this.#busy = false;
    }
  }

  // The same tokens in one read-back at the end: what the device can do when nobody looks.
  async greedyAll(count) {
    this.#begin(count);
    try {
      const [first, begin] = [this.next, this.position];
      for (let k = 0; k < count; ++k) this.#launch();
      const hosts = [this.#fetch(this.#state[TOKEN]), this.#fetch(this.#state[HISTORY])];
      await this.gpu.until(this.device.sync());
      const [[next], seen] = hosts.map((host) => host.toArray());
      for (const host of hosts) host.dispose();
      this.position += count;
      this.next = next;
      return count > 0 ? [first, ...seen.slice(begin + 1, begin + count)] : [];
    } finally {
      this.#busy = false;
    }
  }

  // The kernels of decode(id), `count` times in a row at the same place; nothing comes back and nothing is appended.
  decodeAgain(id, count) {
    this.#room(1);
    return this.#alone(async () => {
      this.#scope(() => {
        const inputs = [this.#int([id], [1, 1]), this.#int([this.position], [1]), this.#int([1], [1])];
        for (let k = 0; k < count; ++k) this.#scope(() => this.function("decode_b1")(...inputs, this.caches, this.params));
      });
      await this.device.sync();
    });
  }

  #begin(count) {
    if (this.next === null) throw new Error("no token to begin with: call prefill or decode first");
    this.#room(count);
    this.#enter();
    const values = [[this.next], [this.position], new Int32Array(this.capacity), [1]];
    this.#scope(() => this.#state.forEach((tensor, i) => tensor.copyFrom(Int32Array.from(values[i]))));
  }

  #launch() {
    this.#scope(() => this.function("greedy_b1")(...this.#state, this.caches, this.params));
  }

  // A copy on the host, there after the next sync.
  #fetch(tensor) {
    const { tvm } = this;
    return this.#scope(() => tvm.detachFromCurrentScope(tvm.empty(tensor.shape, tensor.dtype, tvm.cpu())).copyFrom(tensor));
  }

  // One greedy step -> a promise of the token that it finds. It waits for this step alone, not for later ones.
  #step() {
    this.#launch();
    const host = this.#fetch(this.#state[TOKEN]);
    const read = this.device.sync().then(() => {
      const [id] = host.toArray();
      host.dispose();
      return id;
    });
    read.catch(() => {}); // whoever waits is told
    return read;
  }

  // Free the device. The model is of no use afterwards.
  dispose() {
    if (!this.gpu.lost) this.tvm.dispose(); // TVM's runtime does it by itself when the device is lost
    this.gpu.dispose();
  }
}
