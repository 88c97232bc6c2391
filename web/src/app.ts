// What the parts of the page share: the model that is loaded, what is going on, and what went wrong.

import { DeviceLost, FileError, Unsupported, type Model } from "../lib/model.mjs";
import { button, element, sentence, show, write } from "./dom";
import type { Tokenizer } from "./tokenizer";

export interface Loaded {
  model: Model;
  /** Null for a model of random weights: ids go in and come out. */
  tokenizer: Tokenizer | null;
}

export type Activity = "idle" | "loading" | "writing" | "measuring";

export class App {
  activity: Activity = "idle";
  loaded: Loaded | null = null;
  readonly #parts: (() => void)[] = [];

  constructor(again: () => void) {
    button("again").addEventListener("click", again);
  }

  /** `part` is told whenever the activity or the model changes. */
  onChange(part: () => void): void {
    this.#parts.push(part);
    part();
  }

  set(change: { activity?: Activity; loaded?: Loaded | null }): void {
    Object.assign(this, change);
    for (const part of this.#parts) part();
  }

  get ready(): boolean {
    return this.activity === "idle" && this.loaded !== null;
  }

  /** Let go of the model and its device. */
  unload(): void {
    const { loaded } = this;
    this.set({ loaded: null });
    loaded?.model.dispose();
  }

  clearProblem(): void {
    show({ problem: false });
  }

  /** In words, with a button that loads the model again where that may help. */
  problem(error: unknown): void {
    const titles: [new (...given: never[]) => Error, string][] = [
      [DeviceLost, "The graphics device was lost."],
      [FileError, "The model cannot be loaded."],
      [Unsupported, "This browser cannot run the model."],
    ];
    const title = titles.find(([kind]) => error instanceof kind)?.[1] ?? "That did not work.";
    const message = error instanceof Error ? error.message : String(error);
    const text = message.replace(/^the graphics device was lost( \((.*?)\.?\))?: /, (_, __, why) =>
      why ? `${why}: ` : "",
    );
    write({ "problem-title": title, "problem-text": sentence(text) });
    show({ problem: true, again: this.loaded === null && !(error instanceof Unsupported) });
    element("problem").scrollIntoView({ block: "nearest" });
  }
}
