// Completes prompts with web-llm and the model that this server has. globalThis.mlc is for a program at the page:
// {engine, ids, complete(prompt, options)}. `?plain` leaves the recorder of ids out, so that logits stay on the device.
import { MLCEngine } from "./web-llm.js";

const by = (id) => document.getElementById(id);

// web-llm tells no ids; the hook for logits sees each one that was chosen. Nothing is changed.
class Recorder {
  ids = [];
  processLogits(logits) {
    return logits;
  }
  processSampledToken(token) {
    this.ids.push(token);
  }
  resetState() {
    this.ids = [];
  }
}

async function load() {
  const record = await (await fetch("record.json")).json();
  const here = (path) => new URL(path, location.href).href;
  const recorder = new Recorder();
  const plain = new URLSearchParams(location.search).has("plain");
  const engine = new MLCEngine({
    appConfig: { model_list: [{ ...record, model: here(record.model), model_lib: here(record.model_lib) }] },
    initProgressCallback: ({ text }) => (by("status").textContent = text),
    logitProcessorRegistry: plain ? undefined : new Map([[record.model_id, recorder]]),
    logLevel: "WARN",
  });
  await engine.reload(record.model_id);
  const complete = async (prompt, { tokens = 64, stop } = {}) => {
    const answer = await engine.completions.create({
      prompt,
      max_tokens: tokens,
      temperature: 0,
      ...(stop ? { stop: [stop] } : {}),
    });
    const [{ text, finish_reason }] = answer.choices;
    return { text, finish: finish_reason, ids: plain ? null : recorder.ids, usage: answer.usage };
  };
  return { engine, recorder, complete };
}

async function answer(event) {
  event.preventDefault();
  by("complete").disabled = true;
  try {
    const prompt = by("prompt").value;
    const made = await globalThis.mlc.complete(prompt, { tokens: by("tokens").valueAsNumber, stop: by("stop").value });
    by("text").textContent = prompt + made.text;
    by("facts").textContent = `${made.usage.prompt_tokens} + ${made.usage.completion_tokens + 1} tokens, ${made.finish}`;
  } catch (error) {
    by("status").textContent = String(error);
  } finally {
    by("complete").disabled = false;
  }
}

by("form").addEventListener("submit", answer);
try {
  globalThis.mlc = await load();
  by("status").textContent = "Ready.";
  by("complete").disabled = false;
} catch (error) {
  by("status").textContent = String(error);
  globalThis.mlc = { error: String(error.stack ?? error) };
}
