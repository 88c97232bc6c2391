// node build.mjs [FOLDER] : the page, bundled, into FOLDER (default gpt2_tvm/web_page, which the package ships).
// sources.json beside it records what the bundle was made of, so that a machine without node can tell a stale one.
import { createHash } from "node:crypto";
import fs from "node:fs";
import path from "node:path";
import { fileURLToPath } from "node:url";

const WEB = path.dirname(fileURLToPath(import.meta.url));
const TARGETS = ["chrome113", "firefox141", "safari26"];
const NODE_ONLY = ["fs", "path", "perf_hooks", "ws"]; // the runtime asks for them in node alone
const COPIED = ["index.html", "src/icon.svg"];
const BANNER =
  "/*! gpt2-tvm, with parts of Apache TVM (@mlc-ai/web-runtime) and @huggingface/tokenizers: Apache-2.0 */";

// What the bundle was made of: {"files": {path from the repository: sha256}, "packages": {path in node_modules: its
// integrity in package-lock.json}}. inputs: esbuild's, relative to WEB.
function record(inputs) {
  const lock = JSON.parse(fs.readFileSync(path.join(WEB, "package-lock.json"), "utf8"));
  const [files, packages] = [{}, {}];
  for (const input of [...inputs, ...COPIED, "build.mjs", "tsconfig.json"].sort()) {
    const package_ = /^node_modules\/((@[^/]+\/)?[^/]+)/.exec(input);
    if (package_) packages[package_[0]] = lock.packages[package_[0]].integrity;
    else
      files[path.posix.join("web", input)] = createHash("sha256")
        .update(fs.readFileSync(path.join(WEB, input)))
        .digest("hex");
  }
  return { files, packages };
}

const nothing = {
  name: "nothing in place of node's modules",
  setup(build) {
    build.onResolve({ filter: new RegExp(`^(${NODE_ONLY.join("|")})$`) }, ({ path }) => ({
      path,
      namespace: "nothing",
    }));
    build.onLoad({ filter: /.*/, namespace: "nothing" }, () => ({ contents: "module.exports = {};", loader: "js" }));
  },
};

async function bundle(folder) {
  const esbuild = await import("esbuild");
  fs.mkdirSync(folder, { recursive: true });
  const { metafile } = await esbuild.build({
    absWorkingDir: WEB,
    entryPoints: { page: "src/main.ts", "page.css": "src/page.css" },
    entryNames: "[name]",
    outdir: folder,
    bundle: true,
    minify: true,
    format: "esm",
    target: TARGETS,
    charset: "utf8",
    legalComments: "none",
    banner: { js: BANNER },
    metafile: true,
    plugins: [nothing],
    logLevel: "warning",
  });
  fs.renameSync(path.join(folder, "page.css.css"), path.join(folder, "page.css"));
  for (const name of COPIED) fs.copyFileSync(path.join(WEB, name), path.join(folder, path.basename(name)));
  const inputs = Object.keys(metafile.inputs).filter((name) => !name.startsWith("nothing:"));
  fs.writeFileSync(path.join(folder, "sources.json"), JSON.stringify(record(inputs), null, 1) + "\n");
}

await bundle(path.resolve(process.argv[2] ?? path.join(WEB, "../gpt2_tvm/web_page")));
