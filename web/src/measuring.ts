// The benchmark's button, its result, and its JSON.

import type { App } from "./app";
import { benchmark, type Result } from "./benchmark";
import { button, copies, element, figure, show, write } from "./dom";

export class Measuring {
  readonly #app: App;
  #result: Result | null = null;
  #abort: AbortController | null = null;

  constructor(app: App) {
    this.#app = app;
    button("benchmark").addEventListener("click", () => {
      if (app.activity === "measuring") this.#abort?.abort();
      else void this.run();
    });
    copies("copy-json", () => this.#json());
    app.onChange(() => this.#update());
  }

  async run(): Promise<void> {
    const app = this.#app;
    const { loaded } = app;
    if (!app.ready || loaded === null) return;
    app.clearProblem();
    this.#abort = new AbortController();
    const { signal } = this.#abort;
    app.set({ activity: "measuring" });
    const say = (round: number, rounds: number) =>
      write({ "benchmark-status": round === 0 ? "Warming up" : `Round ${round} of ${rounds - 1}` });
    try {
      this.#result = await benchmark(loaded.model, loaded.tokenizer, say, signal);
      this.#show(this.#result);
    } catch (error) {
      write({ "benchmark-status": signal.aborted ? "Stopped." : "" });
      if (!signal.aborted) app.problem(loaded.model.gpu.lost ?? error);
    } finally {
      app.set({ activity: "idle" });
    }
  }

  #show(result: Result): void {
    write({
      "benchmark-status": `${result.model}, ${result.quantization}, on ${result.device}: medians of ${result.repeats} rounds${
        result.page_was_hidden ? ". The page was hidden meanwhile, which browsers slow down: run it again" : ""
      }.`,
      "bench-prefill": figure(result.prefill_tok_s),
      "bench-prefill-sd": `± ${figure(result.prefill_tok_s_sd)}`,
      "bench-decode": figure(result.decode_tok_s),
      "bench-decode-sd": `± ${figure(result.decode_tok_s_sd)}`,
      "bench-token": figure(result.decode_time_us / 1e3),
      "bench-dispatches": String(result.dispatches_per_token),
      json: this.#json(),
    });
    show({ "benchmark-result": true });
  }

  #json(): string {
    return JSON.stringify(this.#result, null, 1);
  }

  #update(): void {
    const { activity, ready } = this.#app;
    const measuring = activity === "measuring";
    button("benchmark").disabled = !ready && !measuring;
    button("benchmark").textContent = measuring ? "Stop" : "Run";
    element("benchmark-status").setAttribute("aria-busy", String(measuring));
  }
}
