// The files of an artifact: where they come from, and whether they are what the manifest says.

const MANIFEST = "manifest.json";

// A file that is missing, or not what it should be. `file`: its name in the artifact.
export class FileError extends Error {
  constructor(file, message) {
    super(message);
    this.name = "FileError";
    this.file = file;
  }
}

// read(name, onBytes) from the web address `base` (with a slash at its end). onBytes(n): told of n more bytes.
export function fetchFrom(base, { signal } = {}) {
  return async (name, onBytes = () => {}) => {
    let response;
    try {
      response = await fetch(new URL(name, base), { signal });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new FileError(name, `${name} could not be loaded (${error.message}): is the server still running?`);
    }
    if (!response.ok) throw new FileError(name, `${name} is missing from the artifact (HTTP ${response.status})`);
    const parts = [];
    try {
      for await (const part of chunks(response.body)) {
        parts.push(part);
        onBytes(part.byteLength);
      }
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new FileError(name, `${name} stopped coming (${error.message}): load it again`);
    }
    return new Blob(parts).arrayBuffer();
  };
}

async function* chunks(stream) {
  const reader = stream.getReader(); // not every browser iterates over a stream
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}

async function sha256(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// The manifest; its own digest, made with zeros in its place, is compared first.
async function openManifest(read) {
  const damaged = new FileError(MANIFEST, `${MANIFEST} is damaged: load the model again, or compile it again`);
  const text = new TextDecoder().decode(await read(MANIFEST));
  let manifest;
  try {
    manifest = JSON.parse(text);
  } catch {
    throw damaged;
  }
  const digest = String(manifest?.digest);
  const blank = text.replace(digest, "0".repeat(64));
  if (digest.length !== 64 || (await sha256(new TextEncoder().encode(blank))) !== digest) throw damaged;
  return manifest;
}

// An artifact behind read(name, onBytes), a function that gives a file's bytes as an ArrayBuffer or a promise of one.
export class Files {
  // Throws a FileError where the manifest is missing or damaged.
  static async open(read) {
    return new Files(read, await openManifest(read));
  }

  constructor(read, manifest) {
    this.manifest = manifest;
    this.fetch = read;
  }

  has(name) {
    return Object.hasOwn(this.manifest.files, name);
  }

  // Bytes of those files together.
  size(names) {
    return names.reduce((total, name) => total + this.#known(name).bytes, 0);
  }

  // A file, its size and sha256 compared with the manifest's. Throws a FileError.
  async read(name, onBytes = () => {}) {
    const known = this.#known(name);
    let told = 0;
    const bytes = await this.fetch(name, (count) => {
      told += count;
      onBytes(count);
    });
    if (bytes.byteLength !== known.bytes || (await sha256(bytes)) !== known.sha256) {
      throw new FileError(name, `${name} is damaged: load the model again, or compile it again`);
    }
    if (told < known.bytes) onBytes(known.bytes - told); // a source that says nothing as it goes
    return bytes;
  }

  async json(name, onBytes) {
    return JSON.parse(new TextDecoder().decode(await this.read(name, onBytes)));
  }

  #known(name) {
    if (!this.has(name)) throw new FileError(name, `${name} is not part of this artifact: compile it again`);
    return this.manifest.files[name];
  }
}
