// A text, token by token, with the figures of its making.

import type { Model } from "../lib/model.mjs";
import { Random } from "./random";
import { sample, type Sampling } from "./sampling";

export interface Request extends Sampling {
  ids: number[];
  maxTokens: number;
  seed: number;
  /** A token that ends the text; it is not given out. */
  end: number | null;
}

export type Finish = "length" | "end" | "context" | "stopped";

/** Times in milliseconds. */
export class Run {
  readonly request: Request;
  readonly ids: number[] = [];
  finish: Finish | null = null;
  prefillMs = 0;
  decodeMs = 0;
  /** From the start until the first token was handed out. */
  firstTokenMs = 0;
  /** Decode steps that are over. */
  steps = 0;
  /** Kernels launched, for the prompt and for one step; null while there was no step. */
  prefillDispatches = 0;
  dispatchesPerToken: number | null = null;
  readonly #model: Model;
  #stopped = false;

  constructor(model: Model, request: Request) {
    if (request.ids.length === 0) throw new Error("the prompt is empty: write at least one character");
    if (request.ids.length >= model.capacity) {
      throw new Error(
        `the prompt has ${request.ids.length} tokens and the model holds ${model.capacity}: shorten the prompt`,
      );
    }
    this.#model = model;
    this.request = request;
  }

  stop(): void {
    this.#stopped = true;
  }

  get prefillRate(): number {
    return (1e3 * this.request.ids.length) / this.prefillMs;
  }

  get decodeRate(): number {
    return (1e3 * this.steps) / this.decodeMs;
  }

  /** The tokens as they come. A model runs one text at a time. */
  async *tokens(): AsyncGenerator<number> {
    const { gpu, capacity } = this.#model;
    const { ids, maxTokens, temperature, end } = this.request;
    const [begin, dispatches] = [performance.now(), gpu.dispatches];
    this.#model.reset();
    const logits = await this.#model.prefill(ids);
    const decoding = performance.now();
    this.prefillMs = decoding - begin;
    this.prefillDispatches = gpu.dispatches - dispatches;
    const count = Math.min(maxTokens, capacity - ids.length);
    const greedy = temperature === 0;
    let launched = gpu.dispatches;
    for await (const id of greedy ? this.#model.greedy(count) : this.#sampled(logits, count)) {
      this.#count(decoding, this.ids.length);
      if (this.ids.length === 0) this.firstTokenMs = performance.now() - begin;
      this.dispatchesPerToken = gpu.dispatches - launched || this.dispatchesPerToken; // a step between two tokens
      launched = gpu.dispatches;
      if (id === end) {
        this.finish = "end";
        return;
      }
      this.ids.push(id);
      yield id;
      if (this.#stopped) {
        this.finish = "stopped";
        return;
      }
    }
    this.#count(decoding, greedy ? count : count - 1); // greedy has also found the token after the last one
    this.finish = count === maxTokens ? "length" : "context";
  }

  #count(since: number, steps: number): void {
    this.steps = steps;
    this.decodeMs = performance.now() - since;
  }

  async *#sampled(logits: Float32Array, count: number): AsyncGenerator<number> {
    const random = new Random(this.request.seed);
    for (let i = 0; i < count; ++i) {
      const id = sample(logits, this.request, random);
      yield id;
      if (i + 1 < count) logits = await this.#model.decode(id);
    }
  }

  toJSON(): object {
    const { manifest, gpu } = this.#model;
    const { ids, ...options } = this.request;
    return {
      model: manifest.model,
      quantization: manifest.quantization,
      rules: manifest.rules,
      device: gpu.name,
      options,
      prompt_ids: ids,
      ids: this.ids,
      finish: this.finish,
      prefill_tok_s: this.prefillRate,
      decode_tok_s: this.steps ? this.decodeRate : null,
      prefill_time_us: 1e3 * this.prefillMs,
      first_token_time_us: 1e3 * this.firstTokenMs,
      prefill_dispatches: this.prefillDispatches,
      dispatches_per_token: this.dispatchesPerToken,
      decode_steps: this.steps,
    };
  }
}
