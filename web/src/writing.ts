// The prompt, the sampling, the text as it comes, and its speed.

import type { App, Loaded } from "./app";
import { button, copies, element, figure, input, sentence, show, write } from "./dom";
import { Run, type Finish, type Request } from "./runs";
import type { TextStream } from "./tokenizer";

const FIGURES_MS = 200; // how often the figures change while a text is written
const EXAMPLES = {
  austen: ["It is a truth universally acknowledged, that", "Dear Jane,", "Mr. Darcy looked at her and said,"],
  other: ["The history of compilers began", "Once upon a time,", "The best thing about graphics processors is"],
  ids: ["1, 2, 3"],
};
const ENDED: Record<Finish, string> = {
  length: "",
  end: "; the model ended the text",
  context: "; the context is full",
  stopped: "; stopped",
};

/** Pieces of text for ids: whole characters, or the ids themselves where there is no tokenizer. */
function pieces(loaded: Loaded): Pick<TextStream, "push" | "finish"> {
  return loaded.tokenizer?.stream() ?? { push: (id) => ` ${id},`, finish: () => "" };
}

export class Writing {
  /** The last text, for the console and for copying. */
  run: Run | null = null;
  readonly #app: App;
  readonly #prompt = element<HTMLTextAreaElement>("prompt");
  #shownFor: Loaded | null = null;

  constructor(app: App) {
    this.#app = app;
    element("write-form").addEventListener("submit", (event) => {
      event.preventDefault();
      void this.write();
    });
    button("stop").addEventListener("click", () => this.run?.stop());
    button("further").addEventListener("click", () => void this.further());
    this.#prompt.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      void this.write();
    });
    addEventListener("keydown", (event) => event.key === "Escape" && this.run?.stop());
    for (const name of ["temperature", "top-p"]) input(name).addEventListener("input", () => this.#sliders());
    element("sampling").addEventListener("change", () => this.#sliders());
    element("sampling").addEventListener("submit", (event) => event.preventDefault());
    copies("copy-text", () => element("given").textContent! + element("made").textContent!);
    copies("copy-run", () => JSON.stringify(this.run, null, 1));
    this.#sliders();
    app.onChange(() => this.#update());
  }

  #sliders(): void {
    write({ "temperature-value": Number(input("temperature").value).toFixed(2) });
    write({ "top-p-value": Number(input("top-p").value).toFixed(2) });
    show({ chance: this.#sampled });
  }

  get #sampled(): boolean {
    return document.querySelector<HTMLInputElement>('input[name="mode"]:checked')?.value === "sampled";
  }

  /** Write what follows the prompt. */
  async write(): Promise<void> {
    const { loaded } = this.#app;
    if (!this.#app.ready || loaded === null) return;
    const text = this.#prompt.value;
    try {
      const ids = this.#ids(loaded, text);
      element("made").textContent = "";
      write({ given: loaded.tokenizer === null ? `${ids.join(", ")},` : text });
      await this.#stream(loaded, ids);
    } catch (error) {
      this.#app.problem(error);
    }
  }

  /** Go on from the end of the text that is there. */
  async further(): Promise<void> {
    const { loaded } = this.#app;
    if (!this.#app.ready || loaded === null || this.run === null) return;
    await this.#stream(loaded, [...this.run.request.ids, ...this.run.ids]);
  }

  #ids({ tokenizer, model }: Loaded, text: string): number[] {
    if (tokenizer !== null) return tokenizer.encode(text);
    const ids = text
      .split(/[\s,]+/)
      .filter(Boolean)
      .map(Number);
    if (ids.some((id) => !Number.isInteger(id))) {
      throw new Error(`this model has no tokenizer: give ids below ${model.vocabulary}, with commas between`);
    }
    return ids;
  }

  #request(ids: number[], { tokenizer }: Loaded): Request {
    const number = (id: string, name: string) => {
      if (!input(id).checkValidity()) throw new Error(`${name}: ${input(id).validationMessage}`);
      return Number(input(id).value);
    };
    const given = input("seed").value.trim() !== "";
    const request = {
      ids,
      maxTokens: number("max-tokens", "Tokens at most"),
      seed: given ? number("seed", "Seed") : crypto.getRandomValues(new Uint32Array(1))[0]!,
      end: tokenizer?.end ?? null,
    };
    if (!this.#sampled) return { ...request, temperature: 0, topK: 0, topP: 1 };
    const [temperature, topP] = [Number(input("temperature").value), Number(input("top-p").value)];
    return { ...request, temperature, topP, topK: number("top-k", "Top-k") };
  }

  async #stream(loaded: Loaded, ids: number[]): Promise<void> {
    const app = this.#app;
    app.clearProblem();
    try {
      this.run = new Run(loaded.model, this.#request(ids, loaded));
      app.set({ activity: "writing" });
      write({ status: "Reading the prompt" });
      await this.#show(loaded, this.run);
    } catch (error) {
      write({ status: "" });
      app.problem(loaded.model.gpu.lost ?? error);
    } finally {
      app.set({ activity: "idle" });
    }
  }

  async #show(loaded: Loaded, run: Run): Promise<void> {
    const made = element("made");
    const text = pieces(loaded);
    let told = 0;
    for await (const id of run.tokens()) {
      made.append(text.push(id));
      if (run.ids.length > 1 && performance.now() - told < FIGURES_MS) continue;
      told = performance.now();
      write({ status: "Writing" });
      this.#figures(run);
    }
    made.append(text.finish());
    made.normalize();
    this.#figures(run);
    const seed = run.request.temperature === 0 ? "" : `, seed ${run.request.seed}`;
    write({ status: sentence(`${run.ids.length} tokens${seed}${ENDED[run.finish ?? "stopped"]}`) });
  }

  #figures(run: Run): void {
    const steps = run.steps > 0;
    write({
      "decode-rate": figure(steps ? run.decodeRate : null),
      "prefill-rate": figure(run.prefillRate),
      "token-ms": figure(steps ? run.decodeMs / run.steps : null),
      "token-dispatches": run.dispatchesPerToken === null ? "–" : String(run.dispatchesPerToken),
      "first-ms": figure(run.firstTokenMs),
      "prompt-tokens": String(run.request.ids.length),
    });
  }

  #update(): void {
    const { activity, loaded, ready } = this.#app;
    const writing = activity === "writing";
    if (loaded !== null && loaded !== this.#shownFor) this.#introduce(loaded);
    const text = element("made").textContent !== "";
    const goOn = text && this.run?.finish !== "context" && loaded !== null && loaded === this.#shownFor;
    button("write").disabled = !ready;
    show({ stop: writing, further: ready && goOn, caret: writing, empty: !text && !writing });
    button("copy-text").disabled = button("copy-run").disabled = !text || writing;
    element("text").setAttribute("aria-busy", String(writing));
  }

  /** Another model: its examples, and the first of them where nothing has been written. */
  #introduce(loaded: Loaded): void {
    const { tokenizer, model } = loaded;
    const kind = tokenizer === null ? "ids" : /austen/i.test(model.manifest.model) ? "austen" : "other";
    const known = Object.values(EXAMPLES).flat();
    const examples = EXAMPLES[kind];
    if (this.#prompt.value.trim() === "" || known.includes(this.#prompt.value)) this.#prompt.value = examples[0]!;
    const chips = examples.map((text) => {
      const chip = document.createElement("button");
      chip.type = "button";
      chip.textContent = text;
      chip.addEventListener("click", () => {
        this.#prompt.value = text;
        this.#prompt.focus();
      });
      return chip;
    });
    element("examples").replaceChildren(...chips);
    element("text").classList.toggle("ids", tokenizer === null);
    write({ "prompt-label": tokenizer === null ? "Begin with these token ids" : "Begin with" });
    write({ given: "", made: "", status: "" });
    this.run = null;
    this.#shownFor = loaded;
  }
}
