// A model in a page or in node that does what a Python process asks of it: engine calls, and turns of the benchmark.
//
// The agent asks for work with a POST that carries its last answer; the reply is the next order, or 204 to ask again.
// Both are the length of a JSON text (4 bytes, little-endian), the text, and raw bytes that it refers to.

import { Gpu, Model, fetchFrom } from "./model.mjs";

function pack(json, parts = []) {
  const head = new TextEncoder().encode(JSON.stringify(json));
  return new Blob([Uint32Array.of(head.length), head, ...parts]);
}

function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  return [JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length))), new Uint8Array(buffer, 4 + length)];
}

// The device that a model would get.
async function adapter() {
  const gpu = await Gpu.open();
  const { name, features, limits } = gpu;
  gpu.dispose();
  return { adapter: name, features, limits };
}

class Agent {
  #tvmjs;
  #base;
  #model = null;
  #objects = new Map(); // by the numbers that the engine's runner gave them
  #tuples = new Map();

  constructor(tvmjs, base) {
    this.#tvmjs = tvmjs;
    this.#base = base;
  }

  // -> [answer, byte arrays]
  async obey(order, bytes) {
    if (order.do === "adapter") return [await adapter()];
    if (order.do === "load") return [await this.#load()];
    if (order.do === "turn") return [await this.#turn(order)];
    if (order.do === "stream") return [await this.#stream(order)];
    if (order.do === "profile") return [await this.#profile(order)];
    if (order.do === "calls") return this.#calls(order.calls, bytes);
    if (order.do === "timed") return [await this.#timed(order.calls)];
    if (order.do === "lose") return [this.#lose()];
    throw new Error(`no order ${order.do}`);
  }

  async #load() {
    this.#objects.clear();
    this.#tuples.clear();
    if (this.#model) this.#model.dispose();
    this.#model = null;
    const begin = performance.now();
    this.#model = await Model.load(this.#tvmjs, fetchFrom(new URL("artifact/", this.#base)), { timestamps: true });
    const { name, features, limits, canProfile } = this.#model.gpu;
    return { adapter: name, features, limits, timestamps: canProfile, load_ms: performance.now() - begin };
  }

  // A prefill from an empty cache, then `count` tokens in one read-back.
  async #turn({ ids, count }) {
    const model = this.#model;
    model.reset();
    await model.prefill(ids.slice(0, 1)); // untimed: what slept wakes up here
    model.reset();
    const begin = performance.now();
    await model.prefill(ids);
    const middle = performance.now();
    const tokens = await model.greedyAll(count);
    return { prefill_ms: middle - begin, decode_ms: performance.now() - middle, tokens };
  }

  // The tokens that follow, one read-back each, as a page shows them; and what each step handed to the device.
  // lose_after: tokens after which the device is destroyed, for tests.
  async #stream({ ids, count, lose_after }) {
    const model = this.#model;
    model.reset();
    await model.prefill(ids);
    const before = [model.gpu.dispatches, model.gpu.submissions];
    const tokens = [];
    const begin = performance.now();
    for await (const token of model.greedy(count)) {
      tokens.push(token);
      if (tokens.length === lose_after) model.gpu.dispose();
    }
    const stream_ms = performance.now() - begin;
    const [dispatches, submissions] = [model.gpu.dispatches - before[0], model.gpu.submissions - before[1]];
    const { windows } = model.gpu;
    return { stream_ms, tokens, dispatches: dispatches / count, submissions: submissions / count, windows };
  }

  // Microseconds of each kernel of a prefill and of a decode step after it (null where the device has no timestamps),
  // and milliseconds of that step, the mean of `count` in a row with nothing read back.
  async #profile({ ids, count }) {
    const model = this.#model;
    const { gpu } = model;
    model.reset();
    const times = (action) => (gpu.canProfile ? gpu.profile(action) : action().then(() => null));
    const prefill = await times(() => model.prefill(ids));
    const step = await times(() => model.decodeAgain(ids[0], 1));
    const before = gpu.dispatches;
    const begin = performance.now();
    await model.decodeAgain(ids[0], count);
    const step_ms = (performance.now() - begin) / count;
    return { prefill, step, step_ms, kernels: (gpu.dispatches - before) / count };
  }

  // Milliseconds of these calls as they are, and microseconds of each of their kernels in a second run.
  async #timed(calls) {
    const { gpu, device } = this.#model;
    const run = async () => {
      await this.#calls(calls);
      await device.sync();
    };
    const begin = performance.now();
    await run();
    return { whole_ms: performance.now() - begin, kernels: await gpu.profile(run) };
  }

  // For tests: what a driver's reset does.
  #lose() {
    this.#model.gpu.dispose();
    return {};
  }

  // A list of calls as `runners.base.Runner` has them, in order -> what they download.
  async #calls(calls, bytes) {
    const { tvm, device } = this.#model;
    const waiting = [];
    for (const call of calls) {
      tvm.beginScope();
      try {
        const host = this.#call(call, bytes);
        if (host) waiting.push(host);
      } finally {
        tvm.endScope();
      }
    }
    await this.#model.gpu.until(device.sync());
    const made = waiting.map(({ shape, dtype }) => ({ shape, dtype }));
    const parts = waiting.map((host) => host.toRawBytes());
    for (const host of waiting) host.dispose();
    return [{ made }, parts];
  }

  #call(call, bytes) {
    const { tvm, device } = this.#model;
    const keep = (made) => {
      this.#objects.get(call.id)?.dispose();
      this.#objects.set(call.id, tvm.detachFromCurrentScope(made));
    };
    if (call.do === "empty") keep(tvm.empty(call.shape, call.dtype, device));
    if (call.do === "upload") this.#find(call.id).copyFromRawBytes(bytes.subarray(call.at, call.at + call.size));
    if (call.do === "call") {
      const inputs = call.inputs.map((input) => (Array.isArray(input) ? this.#tuple(input) : this.#find(input)));
      const made = this.#model.function(call.function)(...inputs, ...(call.params ? [this.#model.params] : []));
      if (made?.shape) keep(made);
    }
    if (call.do === "free") {
      this.#objects.get(call.id)?.dispose();
      this.#objects.delete(call.id);
    }
    if (call.do === "download") {
      const tensor = this.#find(call.id);
      return tvm.detachFromCurrentScope(tvm.empty(tensor.shape, tensor.dtype, tvm.cpu())).copyFrom(tensor);
    }
    return null;
  }

  #find(id) {
    const found = this.#objects.get(id);
    if (found === undefined) throw new Error(`there is no tensor ${id}`);
    return found;
  }

  // The caches in use; older ones may go.
  #tuple(ids) {
    const key = ids.join();
    if (!this.#tuples.has(key)) {
      for (const old of this.#tuples.values()) old.dispose();
      const { tvm } = this.#model;
      const made = tvm.makeTVMArray(ids.map((id) => this.#find(id)));
      this.#tuples = new Map([[key, tvm.detachFromCurrentScope(made)]]);
    }
    return this.#tuples.get(key);
  }
}

// Obeys the process behind `base` (an address with a slash at its end) until that is gone. say(text): told of each
// order. where: this runtime, in words.
export async function serve(tvmjs, base, where, say = () => {}) {
  const agent = new Agent(tvmjs, base);
  let answer = pack({ hello: where });
  for (;;) {
    let reply;
    try {
      reply = await fetch(new URL("work", base), { method: "POST", body: answer, headers: { "content-type": "application/octet-stream" } });
    } catch {
      return; // the process has ended
    }
    if (reply.status === 404 || reply.status === 410) return;
    if (reply.status === 204) {
      answer = pack({ again: true });
      continue;
    }
    const [order, bytes] = unpack(await reply.arrayBuffer());
    say(order.do);
    try {
      answer = pack(...(await agent.obey(order, bytes)));
    } catch (error) {
      answer = pack({ failed: error.message, kind: error.name });
    }
  }
}
