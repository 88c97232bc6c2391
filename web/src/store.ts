// An artifact's files, kept in this browser (Cache API) under their sha256: a reload goes on where it was interrupted,
// a second visit loads nothing, and two artifacts share what they have in common.

import { FileError, fetchFrom, type Manifest, type Read } from "../lib/model.mjs";

const STORE = "gpt2-tvm";

/** Null where the browser keeps nothing: pages that are not secure, some private windows. */
async function open(): Promise<Cache | null> {
  try {
    return await caches.open(STORE);
  } catch {
    return null;
  }
}

const key = (sha256: string) => new URL(`/kept/${sha256}`, location.origin).href;

async function sha256(bytes: ArrayBuffer): Promise<string> {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export class Store {
  /** Bytes of the files read so far that were kept from before, and that came from the server. */
  kept = 0;
  loaded = 0;
  readonly #fetch: Read;
  readonly #signal: AbortSignal;
  #manifest: Manifest | null = null;
  #manifestBytes: ArrayBuffer | null = null;
  #base: URL;

  /** base: the artifact's address, with a slash at its end. */
  constructor(base: URL, signal: AbortSignal) {
    this.#base = base;
    this.#signal = signal;
    this.#fetch = fetchFrom(base, { signal });
  }

  /** For `Model.load`. Only files that are what the manifest says are kept. */
  readonly read: Read = async (name, onBytes) => {
    const known = this.#manifest?.files[name];
    if (name === "manifest.json") return (this.#manifestBytes ??= this.#parse(await this.#fetch(name, onBytes)));
    if (known === undefined) return await this.#fetch(name, onBytes);
    // Of two tabs that load the same file, the second waits and finds it kept.
    return await locked(known.sha256, this.#signal, async () => {
      const cache = await open();
      const found = await cache?.match(key(known.sha256));
      if (found) {
        this.kept += known.bytes;
        return await found.arrayBuffer();
      }
      const bytes = await this.#fetch(name, onBytes);
      if ((await sha256(bytes)) !== known.sha256)
        throw new FileError(name, this.#damaged(name, bytes.byteLength, known.bytes));
      this.loaded += known.bytes;
      const kept = new Response(bytes, { headers: { "content-length": String(known.bytes) } });
      await cache?.put(key(known.sha256), kept).catch(() => {}); // no room: it works without
      return bytes;
    });
  };

  /** Forget a file that turned out damaged; true if it was kept here, so that another try gets it from the server. */
  async drop(name: string): Promise<boolean> {
    const known = this.#manifest?.files[name];
    return known !== undefined && ((await (await open())?.delete(key(known.sha256))) ?? false);
  }

  #parse(manifest: ArrayBuffer): ArrayBuffer {
    try {
      this.#manifest = JSON.parse(new TextDecoder().decode(manifest)) as Manifest;
    } catch {
      this.#manifest = null; // whoever asked checks it and says so
    }
    return manifest;
  }

  #damaged(name: string, bytes: number, expected: number): string {
    const how =
      bytes === expected ? "its sha256 is not the manifest's" : `it has ${bytes} bytes instead of ${expected}`;
    const where = this.#base.pathname;
    return `${name} is damaged as it arrives (${how}): load it again, or compile ${where} anew if that does not help`;
  }
}

async function locked<T>(name: string, signal: AbortSignal, action: () => Promise<T>): Promise<T> {
  if (navigator.locks === undefined) return action();
  return (await navigator.locks.request(`${STORE}/${name}`, { signal }, action)) as T;
}

/** Bytes that this page keeps in the browser. */
export async function keptBytes(): Promise<number> {
  const cache = await open();
  const requests = (await cache?.keys()) ?? [];
  const found = await Promise.all(requests.map((request) => cache?.match(request)));
  return found.reduce((total, response) => total + Number(response?.headers.get("content-length") ?? 0), 0);
}

export async function forgetAll(): Promise<void> {
  await caches.delete(STORE);
}
