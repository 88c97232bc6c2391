// Text to token ids and back, as gpt2_tvm/tokenizer.py has it: byte-level BPE, nothing put around the text.

import { Tokenizer as Backend } from "@huggingface/tokenizers";

import type { Files } from "../lib/model.mjs";

const END_OF_TEXT = "<|endoftext|>";
// GPT-2's words. \s would not do: JavaScript counts U+FEFF among the spaces, and U+0085 not; Unicode has it the other way.
const WORDS =
  "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\p{White_Space}\\p{L}\\p{N}]+" +
  "|\\p{White_Space}+(?!\\P{White_Space})|\\p{White_Space}+";
const PRE_TOKENIZER = {
  type: "Sequence",
  pretokenizers: [
    { type: "Split", pattern: { Regex: WORDS }, behavior: "Isolated", invert: false },
    { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: false },
  ],
};
const DECODER = { type: "ByteLevel", add_prefix_space: true, trim_offsets: true, use_regex: true };

type Json = Record<string, any>;

interface AddedToken {
  id: number;
  content: string;
  special: boolean;
}

/** What `tokenizer.json` would say of a vocabulary and its merges. */
export function describe(vocab: Record<string, number>, merges: string): Json {
  const pairs = merges.split(/\r?\n/).filter((line, i) => line !== "" && !(i === 0 && line.startsWith("#version")));
  const end = vocab[END_OF_TEXT];
  const plain = { single_word: false, lstrip: false, rstrip: false, normalized: false, special: true };
  return {
    added_tokens: end === undefined ? [] : [{ id: end, content: END_OF_TEXT, ...plain }],
    normalizer: null,
    post_processor: null,
    model: { type: "BPE", vocab, merges: pairs, continuing_subword_prefix: "", end_of_word_suffix: "" },
  };
}

/** GPT-2's alphabet: each byte has a printable character, Latin-1's own or else the next from 256 on. */
function bytesOfCharacters(): Map<string, number> {
  const printable = (byte: number) =>
    (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || (byte >= 0xae && byte <= 0xff);
  const found = new Map<string, number>();
  let next = 256;
  for (let byte = 0; byte < 256; ++byte) found.set(String.fromCharCode(printable(byte) ? byte : next++), byte);
  return found;
}

const ALPHABET = bytesOfCharacters();

export class Tokenizer {
  /** The token that ends a text; null where the vocabulary has none. */
  readonly end: number | null;
  readonly #backend: Backend;
  readonly #special: Map<number, boolean>;

  /** specification: a tokenizer.json. end: the text of the token that ends a text. Throws for one that is not byte-level BPE. */
  constructor(specification: Json, end = END_OF_TEXT) {
    if (specification.model?.type !== "BPE") throw new Error("the tokenizer is not byte-level BPE, which GPT-2's is");
    this.#backend = new Backend(
      { ...specification, pre_tokenizer: PRE_TOKENIZER, decoder: DECODER, post_processor: null },
      {},
    );
    this.end = this.#backend.token_to_id(end) ?? null;
    this.#special = new Map((specification.added_tokens ?? []).map((token: AddedToken) => [token.id, token.special]));
  }

  /** The tokenizer of an artifact; null where it has none (random weights). */
  static async open(files: Files): Promise<Tokenizer | null> {
    const json = async (name: string) => (files.has(name) ? ((await files.json(name)) as Json) : null);
    const end = (await json("tokenizer/tokenizer_config.json"))?.eos_token ?? END_OF_TEXT;
    const text: string = typeof end === "object" ? end.content : end;
    const whole = await json("tokenizer/tokenizer.json");
    if (whole !== null) return new Tokenizer(whole, text);
    const vocab = (await json("tokenizer/vocab.json")) as Record<string, number> | null;
    if (vocab === null) return null;
    const merges = new TextDecoder().decode(await files.read("tokenizer/merges.txt"));
    return new Tokenizer(describe(vocab, merges), text);
  }

  encode(text: string): number[] {
    return text === "" ? [] : this.#backend.encode(text, { add_special_tokens: false }).ids;
  }

  /** What one id stands for; nothing for an id outside the vocabulary and for a special token. */
  bytes(id: number): Uint8Array {
    const token = this.#backend.id_to_token(id);
    if (token === undefined || this.#special.get(id)) return new Uint8Array();
    const bytes = Array.from(token, (character) => ALPHABET.get(character));
    if (bytes.includes(undefined)) return new TextEncoder().encode(token); // an added token in plain text
    return Uint8Array.from(bytes as number[]);
  }

  /** Ids in, whole characters out: a token is a few bytes, and a character may take several tokens. */
  stream(): TextStream {
    return new TextStream(this);
  }
}

export class TextStream {
  readonly #utf8 = new TextDecoder("utf-8", { ignoreBOM: true });
  readonly #tokenizer: Tokenizer;

  constructor(tokenizer: Tokenizer) {
    this.#tokenizer = tokenizer;
  }

  push(id: number): string {
    return this.#utf8.decode(this.#tokenizer.bytes(id), { stream: true });
  }

  /** What is left: nothing, or U+FFFD for a character that lacks bytes. */
  finish(): string {
    return this.#utf8.decode();
  }
}
