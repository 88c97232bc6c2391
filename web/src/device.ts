// The graphics device: its name, limits and features; and what the page keeps in the browser.

import type { App } from "./app";
import { button, element, megabytes, show, write } from "./dom";
import { forgetAll, keptBytes } from "./store";

const LIMITS: [keyof GPUSupportedLimits & string, string, "bytes" | "count"][] = [
  ["maxStorageBufferBindingSize", "One binding", "bytes"],
  ["maxBufferSize", "One buffer", "bytes"],
  ["maxComputeWorkgroupStorageSize", "Workgroup memory", "bytes"],
  ["maxComputeInvocationsPerWorkgroup", "Threads in a workgroup", "count"],
  ["maxStorageBuffersPerShaderStage", "Buffers in a kernel", "count"],
];

function bytes(value: number): string {
  const units = ["bytes", "KiB", "MiB", "GiB"];
  let unit = 0;
  while (value >= 1024 && unit < 3) [value, unit] = [value / 1024, unit + 1];
  return `${Number(value.toFixed(1))} ${units[unit]}`;
}

export class Device {
  constructor(app: App) {
    button("forget").addEventListener("click", () => void forgetAll().then(() => this.#kept()));
    app.onChange(() => app.activity === "idle" && void this.#kept());
  }

  /** Look without asking for a device; true where there is one. */
  async start(): Promise<boolean> {
    const adapter = await navigator.gpu?.requestAdapter({ powerPreference: "high-performance" });
    if (!adapter) {
      write({ "device-summary": "No graphics device that this browser lets pages use." });
      return false;
    }
    const { vendor, architecture, device, description } = adapter.info;
    const name = description || [vendor, architecture, device].filter(Boolean).join(" ") || "a device without a name";
    const has = (feature: GPUFeatureName) => (adapter.features.has(feature) ? "yes" : "no");
    write({
      "device-summary": `${name}. 16-bit floats: ${has("shader-f16")}; subgroups: ${has("subgroups")}.`,
      features: `Features: ${[...adapter.features].sort().join(", ")}.`,
    });
    const rows = LIMITS.map(([limit, label, unit]) => {
      const row = document.createElement("tr");
      const [heading, value] = [document.createElement("th"), document.createElement("td")];
      heading.scope = "row";
      heading.textContent = label;
      const amount = Number(adapter.limits[limit]);
      value.textContent = unit === "bytes" ? bytes(amount) : String(amount);
      row.append(heading, value);
      return row;
    });
    element("limits").replaceChildren(...rows);
    show({ "device-details": true });
    return true;
  }

  async #kept(): Promise<void> {
    const size = await keptBytes().catch(() => 0);
    write({ kept: size > 0 ? `${megabytes(size)} of models kept in this browser.` : "" });
    show({ forget: size > 0 });
  }
}
