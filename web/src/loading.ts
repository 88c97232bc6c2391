// Choosing an artifact, loading it with a progress bar, loading it again.

import * as tvmjs from "@mlc-ai/web-runtime";

import { FileError, Files, Model, type Progress } from "../lib/model.mjs";
import type { App, Loaded } from "./app";
import { button, element, figure, input, megabytes, show, write } from "./dom";
import { Store } from "./store";
import { Tokenizer } from "./tokenizer";

const RESUME = "gpt2-tvm.load"; // in sessionStorage: this tab has that artifact, or was loading it
const WARM_UP = 8; // tokens of a first prefill, so that the first text does not wait for what a driver does late

interface Listed {
  name: string;
  url: string;
  model: string;
  quantization: string;
  bytes: number;
}

/** An artifact's folder on this server. Throws for an address elsewhere, which the page may not ask. */
export function artifactUrl(address: string): URL {
  const url = new URL(address.trim().replace(/manifest\.json$/, ""), location.href);
  if (url.origin !== location.origin)
    throw new Error(`only artifacts of this server (${location.origin}) can be loaded`);
  url.search = url.hash = "";
  if (!url.pathname.endsWith("/")) url.pathname += "/";
  return url;
}

export class Loading {
  readonly #app: App;
  readonly #select = element<HTMLSelectElement>("artifact");
  #abort = new AbortController();

  constructor(app: App) {
    this.#app = app;
    element("load-form").addEventListener("submit", (event) => {
      event.preventDefault();
      void this.load();
    });
    button("cancel").addEventListener("click", () => this.#abort.abort());
    this.#select.addEventListener("change", () => this.#chosen());
    app.onChange(() => this.#update());
  }

  /** Ask the server what it has; load what this tab had before it was loaded anew. */
  async start(): Promise<void> {
    const listed = await this.#list();
    const label = ({ name, model, quantization, bytes }: Listed) =>
      `${name} · ${model === name || name.startsWith(model) ? "" : `${model} · `}${quantization}, ${megabytes(bytes)}`;
    const options = listed.map((artifact) => new Option(label(artifact), artifact.url));
    this.#select.replaceChildren(...options, new Option("Another address …", ""));
    const last = sessionStorage.getItem(RESUME);
    const wanted = last ?? new URLSearchParams(location.search).get("artifact");
    if (wanted !== null) this.#point(wanted);
    this.#chosen();
    if (last !== null) await this.load();
  }

  async #list(): Promise<Listed[]> {
    try {
      const response = await fetch("artifacts.json");
      return response.ok ? ((await response.json()) as Listed[]) : [];
    } catch {
      return [];
    }
  }

  #point(wanted: string): void {
    const option = [...this.#select.options].find(({ value }) => value !== "" && wanted.endsWith(value));
    this.#select.value = option?.value ?? "";
    if (option === undefined) input("address").value = wanted;
  }

  #chosen(): void {
    show({ "address-field": this.#select.value === "" });
  }

  /** Load the artifact that is chosen; what was loaded before goes first. */
  async load(): Promise<void> {
    const app = this.#app;
    if (app.activity !== "idle") return;
    app.clearProblem();
    this.#abort = new AbortController();
    const { signal } = this.#abort;
    app.unload();
    app.set({ activity: "loading" });
    this.#progress("Looking at the model", 0);
    const begin = performance.now();
    try {
      const url = artifactUrl(this.#select.value || input("address").value);
      sessionStorage.setItem(RESUME, url.pathname);
      const store = new Store(url, signal);
      const loaded = await this.#whole(store, signal);
      app.set({ loaded, activity: "idle" });
      history.replaceState(null, "", `?artifact=${url.pathname}`);
      const versions = loaded.model.manifest.versions as Record<string, string>;
      write({ versions: `${versions["gpt2-tvm"]}, model compiled by Apache TVM ${versions["apache-tvm"]}` });
      write({ stage: `Ready in ${figure((performance.now() - begin) / 1e3)} s: ${this.#told(loaded, store)}` });
      loaded.model.gpu.device.lost.then(() => this.#lost(loaded));
    } catch (error) {
      sessionStorage.removeItem(RESUME);
      app.set({ activity: "idle" });
      write({ stage: signal.aborted ? "Cancelled. What has been loaded is kept: it goes on from there." : "" });
      if (!signal.aborted) app.problem(error);
    }
  }

  #told({ model }: Loaded, { kept, loaded }: Store): string {
    const { config, quantization, max_seq_len, random_weights } = model.manifest;
    const from =
      loaded === 0
        ? "all of it kept in this browser"
        : kept === 0
          ? "from the server"
          : `${megabytes(kept)} of it kept here`;
    const layers = config.n_layer === 1 ? "1 layer" : `${config.n_layer} layers`;
    const facts = [layers, quantization, `context of ${max_seq_len} tokens`, `${megabytes(kept + loaded)}, ${from}`];
    return facts.join(" · ") + (random_weights ? ". Its weights are random: it writes noise, at full speed." : "");
  }

  /** The model and its tokenizer; a kept file that turns out damaged is dropped and loaded from the server. */
  async #whole(store: Store, signal: AbortSignal): Promise<Loaded> {
    for (let retried = false; ; retried = true) {
      try {
        return await this.#unlessAborted(signal, this.#open(store));
      } catch (error) {
        if (retried || !(error instanceof FileError) || !(await store.drop(error.file))) throw error;
      }
    }
  }

  async #open(store: Store): Promise<Loaded> {
    const share = { files: 0, shaders: 0 };
    const onProgress = ({ stage, done, total }: Progress) => {
      share[stage] = Math.min(1, done / total);
      const files = stage === "files" ? `${megabytes(done)} of ${megabytes(total)}` : null;
      if (files !== null) this.#files = files;
      const shaders = share.shaders < 1 ? `, shaders ${Math.round(100 * share.shaders)} %` : "";
      this.#progress(`Loading ${this.#files}${shaders}`, 0.8 * share.files + 0.2 * share.shaders);
    };
    const model = await Model.load(tvmjs, store.read, { onProgress });
    try {
      const tokenizer = await Tokenizer.open(await Files.open(store.read));
      await model.prefill(new Array<number>(Math.min(WARM_UP, model.capacity - 1)).fill(0));
      await model.greedyAll(1);
      return { model, tokenizer };
    } catch (error) {
      model.dispose();
      throw error;
    }
  }

  #files = "";

  async #unlessAborted(signal: AbortSignal, opening: Promise<Loaded>): Promise<Loaded> {
    const aborted = new Promise<never>((_, reject) => {
      signal.addEventListener("abort", () => reject(signal.reason), { once: true });
    });
    opening.then(({ model }) => signal.aborted && model.dispose()).catch(() => {});
    return await Promise.race([opening, aborted]);
  }

  #lost(loaded: Loaded): void {
    if (this.#app.loaded !== loaded) return; // let go of on purpose
    const error = loaded.model.gpu.lost;
    this.#app.set({ loaded: null });
    write({ stage: "" });
    sessionStorage.removeItem(RESUME); // a model that brings the device down is not loaded again unasked
    this.#app.problem(error);
  }

  #progress(text: string, share: number): void {
    if (this.#app.activity !== "loading") return; // the rest of a load that was cancelled
    write({ stage: text });
    element<HTMLProgressElement>("bar").value = share;
  }

  #update(): void {
    const { activity, loaded } = this.#app;
    show({ loading: activity === "loading", cancel: activity === "loading", load: activity !== "loading" });
    button("load").disabled = activity !== "idle";
    button("load").textContent = loaded === null ? "Load" : "Load again";
    button("load").classList.toggle("primary", loaded === null);
    this.#select.disabled = activity !== "idle";
  }
}
