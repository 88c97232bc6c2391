// Types of model.mjs, for the page.

export interface Manifest {
  model: string;
  quantization: string;
  max_seq_len: number;
  batch_sizes: number[];
  rules: string[];
  config: { vocab_size: number; n_layer: number; n_embd: number; n_head: number };
  webgpu?: Needs;
  files: Record<string, { bytes: number; sha256: string }>;
  [key: string]: unknown;
}

/** What an artifact's kernels ask of a device. */
export interface Needs {
  features?: string[];
  limits?: Record<string, number>;
}

/** Gives a file of the artifact; onBytes(n) is told of n more bytes as they come. */
export type Read = (name: string, onBytes?: (count: number) => void) => ArrayBuffer | Promise<ArrayBuffer>;

/** stage "files": bytes of weights and code; "shaders": share of the pipelines that are ready. */
export interface Progress {
  stage: "files" | "shaders";
  done: number;
  total: number;
}

/** A file that is missing or damaged; `file` is its name in the artifact (drop it from a cache, then load again). */
export class FileError extends Error {
  constructor(file: string, message: string);
  readonly file: string;
}

/** This browser or device cannot run the model; the message says what helps. */
export class Unsupported extends Error {}

/** The device is gone; a model loaded anew works again. */
export class DeviceLost extends Error {}

export function fetchFrom(base: string | URL, options?: { signal?: AbortSignal }): Read;

export class Files {
  static open(read: Read): Promise<Files>;
  readonly manifest: Manifest;
  has(name: string): boolean;
  size(names: string[]): number;
  /** Size and sha256 compared with the manifest's; throws FileError. */
  read(name: string, onBytes?: (count: number) => void): Promise<ArrayBuffer>;
  json(name: string, onBytes?: (count: number) => void): Promise<unknown>;
}

export class Gpu {
  static open(needs?: Needs, options?: { timestamps?: boolean }): Promise<Gpu>;
  readonly device: GPUDevice;
  readonly info: GPUAdapterInfo;
  readonly name: string;
  /** Of the adapter. */
  readonly features: string[];
  readonly limits: Record<string, number>;
  /** Kernels launched so far, and command buffers handed over: differences count a token's. */
  readonly dispatches: number;
  readonly submissions: number;
  /** Parts of tensors larger than one binding, bound so far. */
  readonly windows: number;
  readonly lost: DeviceLost | null;
  /** A CPU that plays a GPU. */
  readonly software: boolean;
  readonly canProfile: boolean;
  /** Microseconds of each kernel that `action` launches. */
  profile(action: () => Promise<unknown>): Promise<number[]>;
}

/** One text at a time; a second call meanwhile throws. */
export class Model {
  static load(
    tvmjs: typeof import("@mlc-ai/web-runtime"),
    read: Read,
    options?: { onProgress?: (progress: Progress) => void; timestamps?: boolean },
  ): Promise<Model>;
  readonly gpu: Gpu;
  readonly manifest: Manifest;
  /** Tokens that the cache holds. */
  readonly capacity: number;
  readonly vocabulary: number;
  /** Tokens in the cache. */
  readonly position: number;
  /** The most likely next token, once logits were made. */
  readonly next: number | null;
  reset(): void;
  rewind(position: number): void;
  /** Append a prompt -> the logits after its last token, [vocabulary]. */
  prefill(ids: number[]): Promise<Float32Array>;
  /** Append one token -> the logits after it: for sampling. */
  decode(id: number): Promise<Float32Array>;
  /** The most likely tokens as they come, each appended; leave the loop to stop. */
  greedy(count: number): AsyncGenerator<number, void, void>;
  /** The same in one read-back at the end: for the benchmark. */
  greedyAll(count: number): Promise<number[]>;
  /** The kernels of decode(id), `count` times at the same place; nothing is appended: for timing them. */
  decodeAgain(id: number, count: number): Promise<void>;
  dispose(): void;
}
