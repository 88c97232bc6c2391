// The 322 + 64 benchmark of python -m gpt2_tvm.benchmark, in this browser.

import prompt from "../../gpt2_tvm/data/gettysburg.json";
import type { Model } from "../lib/model.mjs";
import type { Tokenizer } from "./tokenizer";

export const PROMPT_TOKENS = 322;
export const GENERATE_TOKENS = 64;
const [WARMUPS, ROUNDS] = [1, 5];

/** Exactly `n` ids below the vocabulary's size, as gpt2_tvm.data.prompt_for makes them. */
export function promptFor(tokenizer: Tokenizer | null, vocabulary: number, n: number): number[] {
  const encoded = tokenizer?.encode(prompt.text) ?? [];
  const ids = encoded.length > 0 ? encoded : prompt.ids;
  return Array.from({ length: n }, (_, i) => ids[i % ids.length]! % vocabulary);
}

/** The median and the sample standard deviation (0 for one value). */
export function summary(values: number[]): { median: number; sd: number } {
  const sorted = [...values].sort((a, b) => a - b);
  const half = sorted.length >> 1;
  const median = sorted.length % 2 ? sorted[half]! : (sorted[half - 1]! + sorted[half]!) / 2;
  const mean = values.reduce((total, value) => total + value, 0) / values.length;
  const squares = values.reduce((total, value) => total + (value - mean) ** 2, 0);
  return { median, sd: values.length > 1 ? Math.sqrt(squares / (values.length - 1)) : 0 };
}

export interface Result {
  model: string;
  target: string;
  quantization: string;
  rules: string;
  attention: string;
  batch: number;
  prompt_tokens: number;
  generate_tokens: number;
  repeats: number;
  prefill_tok_s: number;
  prefill_tok_s_sd: number;
  decode_tok_s: number;
  decode_tok_s_sd: number;
  ttft_ms: number;
  decode_time_us: number;
  decode_time_us_sd: number;
  dispatches_per_token: number;
  dispatches_per_prefill: number;
  device: string;
  browser: string;
  page_was_hidden: boolean;
  date: string;
  versions: Record<string, string>;
}

/**
 * A warm-up and five rounds, each a prefill from an empty cache and a greedy loop that stays on the device until one
 * read-back at its end. say: told before each round. Throws what the model throws, and an AbortError.
 */
export async function benchmark(
  model: Model,
  tokenizer: Tokenizer | null,
  say: (round: number, rounds: number) => void,
  signal: AbortSignal,
): Promise<Result> {
  const total = PROMPT_TOKENS + GENERATE_TOKENS;
  if (total > model.capacity)
    throw new Error(`the benchmark takes ${total} tokens, this model holds ${model.capacity}`);
  const ids = promptFor(tokenizer, model.vocabulary, PROMPT_TOKENS);
  const [prefill, decode] = [[] as number[], [] as number[]];
  let [hidden, perPrefill, perToken] = [false, 0, 0];
  for (let round = 0; round < WARMUPS + ROUNDS; ++round) {
    signal.throwIfAborted();
    say(round, WARMUPS + ROUNDS);
    model.reset();
    const [begin, atBegin] = [performance.now(), model.gpu.dispatches];
    await model.prefill(ids);
    const [middle, atMiddle] = [performance.now(), model.gpu.dispatches];
    await model.greedyAll(GENERATE_TOKENS);
    const end = performance.now();
    hidden ||= document.hidden;
    [perPrefill, perToken] = [atMiddle - atBegin, (model.gpu.dispatches - atMiddle) / GENERATE_TOKENS];
    if (round < WARMUPS) continue;
    prefill.push((1e3 * PROMPT_TOKENS) / (middle - begin));
    decode.push((1e3 * GENERATE_TOKENS) / (end - middle));
  }
  const [prefilled, decoded, step] = [summary(prefill), summary(decode), summary(decode.map((rate) => 1e6 / rate))];
  const { manifest } = model;
  return {
    model: manifest.model,
    target: (manifest.target as { name: string }).name,
    quantization: manifest.quantization,
    rules: manifest.rules.join(",") || "none",
    attention: String(manifest.attention),
    batch: 1,
    prompt_tokens: PROMPT_TOKENS,
    generate_tokens: GENERATE_TOKENS,
    repeats: ROUNDS,
    prefill_tok_s: prefilled.median,
    prefill_tok_s_sd: prefilled.sd,
    decode_tok_s: decoded.median,
    decode_tok_s_sd: decoded.sd,
    ttft_ms: summary(prefill.map((rate) => (1e3 * PROMPT_TOKENS) / rate)).median,
    decode_time_us: step.median,
    decode_time_us_sd: step.sd,
    dispatches_per_token: perToken,
    dispatches_per_prefill: perPrefill,
    device: model.gpu.name,
    browser: navigator.userAgent,
    page_was_hidden: hidden,
    date: new Date().toISOString(),
    versions: manifest.versions as Record<string, string>,
  };
}
