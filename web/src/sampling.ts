// From logits to a token: temperature, top-k and top-p, as gpt2_tvm/decoding/sampling.py has them.

import type { Random } from "./random";

export interface Sampling {
  /** Divides the logits; 0 leaves only the most likely token. */
  temperature: number;
  /** Keep the k most likely tokens; 0 keeps all. */
  topK: number;
  /** Then keep the smallest set of the most likely tokens that holds this share. */
  topP: number;
}

export interface Distribution {
  ids: number[];
  /** Of `ids`: positive, falling, 1 together. */
  shares: number[];
}

/** The tokens that may come next. Of equal logits the lower ids are the more likely ones. Throws for NaN. */
export function distribution(logits: ArrayLike<number>, { temperature, topK, topP }: Sampling): Distribution {
  let best = 0;
  for (let i = 0; i < logits.length; ++i) {
    if (Number.isNaN(logits[i]!))
      throw new Error("the model gave NaN instead of logits: its weights are damaged, or too large for its arithmetic");
    if (logits[i]! > logits[best]!) best = i;
  }
  if (temperature === 0 || topK === 1 || topP === 0) return { ids: [best], shares: [1] };

  const weights = Float64Array.from(logits, (value) => Math.exp((value - logits[best]!) / temperature));
  let order = Array.from(weights.keys());
  const falling = (a: number, b: number) => logits[b]! - logits[a]! || a - b;
  if (topK > 0 && topK < order.length) order = order.sort(falling).slice(0, topK);
  let total = sum(order, weights);
  if (topP < 1) {
    // Tokens below (1 - p) / n hold less than 1 - p together: the set we look for is among the others. Sort those.
    const least = ((1 - topP) / order.length) * total;
    order = order.filter((id) => weights[id]! >= least).sort(falling);
    let held = 0;
    order.length = Math.min(
      order.length,
      1 + order.findIndex((id) => (held += weights[id]! / total) >= topP) || order.length,
    );
    total = sum(order, weights);
  } else {
    order.sort(falling);
  }
  const ids = order.filter((id) => weights[id]! > 0);
  return { ids, shares: ids.map((id) => weights[id]! / total) };
}

function sum(ids: number[], weights: Float64Array): number {
  return ids.reduce((total, id) => total + weights[id]!, 0);
}

/** One token drawn from `distribution`; one number is taken from `random` unless a single token is left. */
export function sample(logits: ArrayLike<number>, sampling: Sampling, random: Random): number {
  const { ids, shares } = distribution(logits, sampling);
  if (ids.length === 1) return ids[0]!;
  const drawn = random.next();
  let held = 0;
  const at = shares.findIndex((share) => (held += share) > drawn);
  return ids[at === -1 ? ids.length - 1 : at]!;
}
