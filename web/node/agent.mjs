// node node/agent.mjs ADDRESS : lib/agent.mjs in node, for the process behind the address.
import { serve } from "../lib/agent.mjs";
import { dawn } from "./dawn.mjs";

await serve(dawn(), process.argv[2], `node ${process.versions.node}, Dawn`);
process.exit(0); // Dawn would keep the process alive
