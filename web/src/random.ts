// numpy.random.default_rng(seed).random(): a seed writes the same text here as with python -m gpt2_tvm.generate.
// SeedSequence spreads the seed over a pool of four words (Melissa O'Neill, "Developing a seed_seq alternative");
// PCG64 is her generator with 128 bits of state and the output function XSL-RR.

const [POOL, WORD, MASK_64, MASK_128] = [4, 0xffffffff, (1n << 64n) - 1n, (1n << 128n) - 1n];
const MULTIPLIER = 0x2360ed051fc65da44385df649fccf645n;

/** A hash with a running constant: each call mixes another word. */
function hasher(constant: number, multiplier: number): (word: number) => number {
  return (word) => {
    const mixed = word ^ constant;
    constant = Math.imul(constant, multiplier);
    const hashed = Math.imul(mixed, constant);
    return (hashed ^ (hashed >>> 16)) >>> 0;
  };
}

function mix(a: number, b: number): number {
  const mixed = (Math.imul(0xca01f9dd, a) - Math.imul(0x4973f715, b)) | 0;
  return (mixed ^ (mixed >>> 16)) >>> 0;
}

/** SeedSequence(seed).generate_state(4, uint64). */
function seedWords(seed: number): bigint[] {
  const entropy = [seed & WORD, Math.floor(seed / 2 ** 32)];
  const hash = hasher(0x43b0d7e5, 0x931e8875);
  const pool = Array.from({ length: POOL }, (_, i) => hash(entropy[i] ?? 0));
  for (let from = 0; from < POOL; ++from) {
    for (let to = 0; to < POOL; ++to) if (from !== to) pool[to] = mix(pool[to]!, hash(pool[from]!));
  }
  const out = hasher(0x8b51f9dd, 0x58f38ded);
  const halves = Array.from({ length: 8 }, (_, i) => BigInt(out(pool[i % POOL]!)));
  return [0, 2, 4, 6].map((i) => halves[i]! | (halves[i + 1]! << 32n));
}

export class Random {
  #state: bigint;
  readonly #increment: bigint;

  /** seed: an integer from 0 to 2^53 - 1. */
  constructor(seed: number) {
    const [a, b, c, d] = seedWords(seed) as [bigint, bigint, bigint, bigint];
    this.#increment = ((((c << 64n) | d) << 1n) | 1n) & MASK_128;
    this.#state = 0n;
    this.#step();
    this.#state = (this.#state + ((a << 64n) | b)) & MASK_128;
    this.#step();
  }

  /** The next number, from 0 to below 1. */
  next(): number {
    this.#step();
    const turn = this.#state >> 122n;
    const word = (this.#state >> 64n) ^ (this.#state & MASK_64);
    const turned = ((word >> turn) | (word << (-turn & 63n))) & MASK_64;
    return Number(turned >> 11n) / 2 ** 53;
  }

  #step(): void {
    this.#state = (this.#state * MULTIPLIER + this.#increment) & MASK_128;
  }
}
