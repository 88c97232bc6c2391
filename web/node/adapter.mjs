// node node/adapter.mjs : the name of the device that Dawn chooses, or "none".
import { dawn } from "./dawn.mjs";

dawn();
const adapter = await navigator.gpu.requestAdapter({ powerPreference: "high-performance" });
process.stdout.write(`${adapter?.info.description || adapter?.info.vendor || "none"}\n`, () => process.exit(0));
