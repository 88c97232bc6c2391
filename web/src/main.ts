import { Unsupported } from "../lib/model.mjs";
import { App } from "./app";
import { Device } from "./device";
import { Loading } from "./loading";
import { Measuring } from "./measuring";
import { Writing } from "./writing";

const app: App = new App(() => void loading.load());
const loading = new Loading(app);
const writing = new Writing(app);
new Measuring(app);
const device = new Device(app);

/** For the browser's console: await gpt2.model.prefill([1, 2, 3]) gives logits. */
Object.defineProperty(globalThis, "gpt2", {
  value: {
    get model() {
      return app.loaded?.model ?? null;
    },
    get tokenizer() {
      return app.loaded?.tokenizer ?? null;
    },
    get run() {
      return writing.run;
    },
  },
});

const found = await device.start();
if (!found)
  app.problem(
    new Unsupported(
      navigator.gpu !== undefined
        ? "it has WebGPU but no graphics device for it: is hardware acceleration switched on, and the driver up to date?"
        : isSecureContext
          ? "it has no WebGPU: use Chrome or Edge 113, Firefox 141, Safari 26, or later ones"
          : "browsers offer WebGPU to secure pages alone: open this page on localhost, or through https",
    ),
  );
await loading.start();
