// A WebGPU device that has what a model's kernels need; its work counted, and timed on request.

const MIB = 1 << 20;
const MOST_PASSES = 2048; // a query set holds at most 4096 timestamps
const FEATURES = { "shader-f16": "16-bit floats (shader-f16)", subgroups: "subgroups" };
const INSTEAD = { "shader-f16": "compile the model with --quantization q0f32", subgroups: "compile it without them" };
const LIMITS = {
  maxStorageBufferBindingSize: "in one binding",
  maxBufferSize: "in one buffer",
  maxComputeInvocationsPerWorkgroup: "threads in a workgroup",
  maxComputeWorkgroupSizeX: "threads along x",
  maxComputeWorkgroupSizeY: "threads along y",
  maxComputeWorkgroupSizeZ: "threads along z",
  maxComputeWorkgroupStorageSize: "of workgroup memory",
  maxStorageBuffersPerShaderStage: "buffers in a kernel",
};

// This browser or device cannot run the model; the message says what is missing and what helps.
export class Unsupported extends Error {
  constructor(message) {
    super(message);
    this.name = "Unsupported";
  }
}

// The device is gone: a driver's reset, a laptop's sleep, device.destroy(). A model loaded anew works again.
export class DeviceLost extends Error {
  constructor(reason) {
    super(`the graphics device was lost${reason ? ` (${reason})` : ""}: load the model again`);
    this.name = "DeviceLost";
  }
}

function amount(name, value) {
  if (!/Size$/.test(name)) return String(value);
  return value >= MIB ? `${Math.ceil(value / MIB)} MiB` : `${value} bytes`;
}

export function nameOf(info) {
  return info.description || [info.vendor, info.architecture, info.device].filter(Boolean).join(" ") || "this device";
}

// What the variants of kernels in an artifact's list (kernels.json) can use of a device.
export function wantedBy({ variants = [] }) {
  return variants.flatMap(({ requires }) => requires.filter((name) => name in FEATURES));
}

// Compares an adapter with `needs` ({features: [name], limits: {name: number}}). Throws Unsupported.
export function checkAdapter(adapter, needs) {
  const name = nameOf(adapter.info);
  for (const feature of needs.features ?? []) {
    if (!adapter.features.has(feature)) {
      throw new Unsupported(`${name} has no ${FEATURES[feature] ?? feature}, which this model needs: ${INSTEAD[feature]}`);
    }
  }
  for (const [limit, wanted] of Object.entries(needs.limits ?? {})) {
    if (adapter.limits[limit] < wanted) {
      const [asks, has] = [amount(limit, wanted), amount(limit, adapter.limits[limit])];
      throw new Unsupported(
        `this model needs ${asks} ${LIMITS[limit] ?? limit}, ${name} allows ${has}: ` +
          "choose a smaller model or quantization, or another browser or device",
      );
    }
  }
}

async function requestAdapter() {
  if (globalThis.navigator?.gpu === undefined) {
    throw new Unsupported(
      globalThis.isSecureContext === false
        ? "browsers offer WebGPU to secure pages alone: open this page on localhost or through https"
        : "this browser has no WebGPU: use Chrome or Edge 113, Firefox 141, Safari 26, or later ones",
    );
  }
  const adapter = await navigator.gpu.requestAdapter({ powerPreference: "high-performance" });
  if (adapter === null) {
    throw new Unsupported("this browser has WebGPU but no graphics device for it: is hardware acceleration switched on?");
  }
  return adapter;
}

const SOFTWARE = /swiftshader|llvmpipe|basic render/i;

// The kernels in a WGSL file that TVM made, by name. The guard against blocks that folding a wide grid added is mended
// as the runtime mends its own (gpt2_tvm/toolchains/webruntime/patches.py).
export function parseKernels(text) {
  const kernels = new Map();
  for (const part of text.split(/^(?=\/\/ Function: )/m)) {
    const name = entryPoint(part);
    if (name) kernels.set(name, part.replace(/>(\s*podArgs\.packGridDimX\))/g, ">=$1"));
  }
  return kernels;
}

function entryPoint(code) {
  return /@compute\s+@workgroup_size\([^)]*\)\s*fn\s+(\w+)/.exec(code)?.[1];
}

export class Gpu {
  // needs: see checkAdapter. timestamps: also ask for what `profile` takes, wants: and for these features, each where
  // the adapter has it.
  // Throws Unsupported where there is no WebGPU, no adapter, or one without a needed feature or limit.
  static async open(needs = {}, { timestamps = false, wants = [] } = {}) {
    const adapter = await requestAdapter();
    checkAdapter(adapter, needs);
    const more = [...wants, ...(timestamps ? ["timestamp-query"] : [])].filter((name) => adapter.features.has(name));
    const requiredFeatures = [...new Set([...(needs.features ?? []), ...more])];
    const device = await adapter.requestDevice({ requiredFeatures, requiredLimits: { ...needs.limits } });
    return new Gpu(adapter, device);
  }

  #stamps = null;
  #kernels = new Map();
  #windows = new Map(); // kernel -> its bindings, see `bindInWindows`
  #loss;

  constructor(adapter, device) {
    this.device = device;
    this.info = adapter.info;
    this.name = nameOf(adapter.info);
    this.features = [...adapter.features].sort(); // of the adapter: what could be asked for
    const fallback = adapter.info.isFallbackAdapter ?? adapter.isFallbackAdapter ?? false;
    this.software = fallback || SOFTWARE.test(this.name); // a CPU that plays a GPU
    this.limits = Object.fromEntries(Object.keys(LIMITS).map((name) => [name, adapter.limits[name]]));
    this.dispatches = 0; // kernels launched so far
    this.submissions = 0; // command buffers handed over so far
    this.windows = 0; // parts of a large tensor bound so far
    this.lost = null; // a DeviceLost, once it is
    this.faults = []; // what WebGPU reported outside of any call, such as a shader that it refuses
    device.addEventListener("uncapturederror", (event) => this.faults.push(event.error.message));
    this.#loss = new Promise((_, reject) => {
      device.lost.then((info) => {
        this.lost = new DeviceLost(info.message || (info.reason === "destroyed" ? "destroyed" : ""));
        reject(this.lost);
      });
    });
    this.#loss.catch(() => {}); // whoever waits is told by `until`
    this.#watch();
  }

  // Whether all of `requires` is so: features that the device was opened with, "software", or "swiftshader".
  meets(requires) {
    const are = { software: this.software, swiftshader: /swiftshader/i.test(this.name) };
    return requires.every((name) => are[name] ?? this.device.features.has(name));
  }

  // From now on these sources (`parseKernels`) stand in for kernels of the same name.
  replaceKernels(kernels) {
    for (const [name, code] of kernels) this.#kernels.set(name, code);
  }

  // Kernels that take a tensor larger than one binding in parts. windows: Map of kernel -> [null, or the parts
  // [{offset, size}, ...] of that buffer, one a buffer]. Their sources must be replaced too.
  bindInWindows(windows) {
    this.#windows = windows;
  }

  // What `promise` gives; a DeviceLost as soon as the device is lost, and an Error for what WebGPU reported meanwhile.
  async until(promise) {
    let value;
    try {
      value = await Promise.race([promise, this.#loss]);
    } catch (error) {
      await Promise.race([this.device.lost, new Promise((done) => setTimeout(done, 50))]); // it may say so only now
      throw this.lost ?? error;
    }
    this.check();
    return value;
  }

  // Throws for a device that is lost, and for what WebGPU reported.
  check() {
    if (this.lost) throw this.lost;
    if (this.faults.length) throw new Error(`WebGPU reports: ${this.faults[0]}`);
  }

  get canProfile() {
    return this.device.features.has("timestamp-query");
  }

  // Microseconds that each kernel launched by `action` takes, in order. action: an async function whose work is handed
  // over when it ends. Throws Unsupported where the device has no timestamps.
  async profile(action) {
    if (!this.canProfile) throw new Unsupported(`${this.name} has no timestamps (timestamp-query)`);
    const { device } = this;
    const set = device.createQuerySet({ type: "timestamp", count: 2 * MOST_PASSES });
    const stamps = (this.#stamps = { set, next: 0 });
    try {
      await action();
    } finally {
      this.#stamps = null;
    }
    const count = stamps.next;
    if (count > MOST_PASSES) throw new Error(`${count} kernels are more than can be timed at once (${MOST_PASSES})`);
    if (count === 0) return [];
    const size = 16 * count;
    const resolved = device.createBuffer({ size, usage: GPUBufferUsage.QUERY_RESOLVE | GPUBufferUsage.COPY_SRC });
    const host = device.createBuffer({ size, usage: GPUBufferUsage.MAP_READ | GPUBufferUsage.COPY_DST });
    const encoder = device.createCommandEncoder();
    encoder.resolveQuerySet(set, 0, 2 * count, resolved, 0);
    encoder.copyBufferToBuffer(resolved, 0, host, 0, size);
    device.queue.submit([encoder.finish()]);
    await this.until(host.mapAsync(GPUMapMode.READ));
    const ticks = new BigInt64Array(host.getMappedRange().slice(0));
    for (const thing of [set, resolved, host]) thing.destroy();
    return Array.from({ length: count }, (_, i) => Number(ticks[2 * i + 1] - ticks[2 * i]) / 1e3);
  }

  dispose() {
    this.device.destroy();
  }

  // TVM's runtime gives every kernel a pass of its own.
  #watch() {
    const { device } = this;
    const { queue } = device;
    const create = device.createCommandEncoder.bind(device);
    device.createCommandEncoder = (descriptor) => {
      const encoder = create(descriptor);
      const begin = encoder.beginComputePass.bind(encoder);
      encoder.beginComputePass = (pass) => {
        this.dispatches += 1;
        return begin(this.#stamped(pass));
      };
      return encoder;
    };
    const compile = device.createShaderModule.bind(device);
    device.createShaderModule = (given) => compile({ ...given, code: this.#kernels.get(entryPoint(given.code)) ?? given.code });
    this.#split();
    const submit = queue.submit.bind(queue);
    queue.submit = (commands) => {
      this.submissions += 1;
      submit(commands);
    };
  }

  // TVM's runtime binds whole buffers. Where a kernel takes windows, the pipeline gets another layout, and bind groups
  // for the one that the runtime knows get it too.
  #split() {
    const { device } = this;
    const [entriesOf, layoutOf, splits] = [new WeakMap(), new WeakMap(), new WeakMap()];
    const number = (entries) => entries.map((entry, binding) => ({ ...entry, binding }));
    const bindGroupLayout = device.createBindGroupLayout.bind(device);
    const pipelineLayout = device.createPipelineLayout.bind(device);
    const bindGroup = device.createBindGroup.bind(device);
    device.createBindGroupLayout = (given) => {
      const layout = bindGroupLayout(given);
      entriesOf.set(layout, given.entries);
      return layout;
    };
    device.createPipelineLayout = (given) => {
      const layout = pipelineLayout(given);
      layoutOf.set(layout, given.bindGroupLayouts[0]);
      return layout;
    };
    for (const name of ["createComputePipeline", "createComputePipelineAsync"]) {
      const create = device[name].bind(device);
      device[name] = (given) => {
        const parts = this.#windows.get(given.compute.entryPoint);
        if (parts === undefined) return create(given);
        const known = layoutOf.get(given.layout);
        const entries = entriesOf.get(known).flatMap((entry, i) => (parts[i] ?? [null]).map(() => entry));
        const layout = bindGroupLayout({ entries: number(entries) });
        splits.set(known, { layout, parts });
        return create({ ...given, layout: pipelineLayout({ bindGroupLayouts: [layout] }) });
      };
    }
    device.createBindGroup = (given) => {
      const split = splits.get(given.layout);
      if (split === undefined) return bindGroup(given);
      const entries = given.entries.flatMap((entry, i) => {
        const parts = split.parts[i] ?? null;
        this.windows += parts?.length ?? 0;
        return parts?.map((part) => ({ resource: { buffer: entry.resource.buffer, ...part } })) ?? [entry];
      });
      return bindGroup({ layout: split.layout, entries: number(entries) });
    };
  }

  #stamped(pass) {
    if (this.#stamps === null) return pass;
    const index = this.#stamps.next++;
    if (index >= MOST_PASSES) return pass;
    const [beginningOfPassWriteIndex, endOfPassWriteIndex] = [2 * index, 2 * index + 1];
    return { ...pass, timestampWrites: { querySet: this.#stamps.set, beginningOfPassWriteIndex, endOfPassWriteIndex } };
  }
}
