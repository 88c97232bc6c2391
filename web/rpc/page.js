// TVM's RPC server in a page: one connection, one WebAssembly module, one GPU device; then the page loads again.
"use strict";

const KEY = "page";
const state = document.getElementById("state");
const log = document.getElementById("log");
const faults = []; // what WebGPU reports outside of any call: shaders that do not compile, a lost device

function say(text) {
  state.textContent = text;
}

function note(text) {
  console.log(text);
  log.textContent = (log.textContent + text + "\n").split("\n").slice(-20).join("\n");
}

function watchDevices() {
  const request = GPUAdapter.prototype.requestDevice;
  GPUAdapter.prototype.requestDevice = async function (...given) {
    const device = await request.apply(this, given);
    device.addEventListener("uncapturederror", (event) => faults.push(event.error.message));
    device.lost.then((info) => faults.push("the device was lost: " + info.message));
    return device;
  };
}

async function loadAgain() {
  for (;;) {
    try {
      await fetch(location.href, { cache: "no-store" });
      location.reload();
      return;
    } catch {
      say("waiting for the sweep");
      await new Promise((done) => setTimeout(done, 500));
    }
  }
}

class Server extends tvmjs.RPCServer {
  onClose() {
    loadAgain();
  }
}

async function start() {
  const adapter = navigator.gpu ? await navigator.gpu.requestAdapter() : null;
  if (adapter === null) {
    say("This browser offers no WebGPU" + (isSecureContext ? "." : " to pages from other machines: open it on localhost."));
    console.error("no WebGPU adapter");
    return;
  }
  watchDevices();
  const { vendor, architecture, device, description } = adapter.info;
  const facts = { vendor, architecture, device, description, agent: navigator.userAgent };
  const fallback = adapter.info.isFallbackAdapter ?? adapter.isFallbackAdapter ?? false;
  const asked = new URL("ws", location.href);
  asked.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  const server = new Server(asked.href, KEY, () => tvmjs.createPolyfillWASI(), note, "", "cpu", undefined, async (tvm) => {
    tvm.registerFunc("gpt2_tvm.page", () => JSON.stringify({ ...facts, fallback, faults }));
    tvm.registerFunc("gpt2_tvm.leave", () => {
      setTimeout(() => server.socket.close(), 0); // once this call's answer is on its way
      return 0;
    });
    say("measuring");
  });
  // After an exception inside the module nothing of it can be trusted: the sweep sees the connection end.
  const giveUp = (what) => {
    console.error("page failed: " + what);
    server.socket.close();
  };
  addEventListener("error", (event) => giveUp(event.message));
  addEventListener("unhandledrejection", (event) => giveUp(event.reason));
  say("ready: " + [vendor, architecture, device, description].filter(Boolean).join(" "));
}

start();
