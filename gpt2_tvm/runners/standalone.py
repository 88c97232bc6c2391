"""`run.py` of a bundle made by `gpt2_tvm.pack`: text from the artifact beside it, with the runtime beside it.

    python run.py "It is a truth" --max-tokens 64
    python run.py --benchmark

Needs CPython of the version that the bundle was made with, and numpy. It runs on TVM's runtime alone, without a
compiler, and it is the same `Engine` as everywhere else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import sysconfig
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Parse the command line, check that the bundle fits this machine, and run it. Exit status 1 for an error."""
    parser = argparse.ArgumentParser(prog="run.py", description="Run the GPT-2 in this bundle.")
    parser.add_argument("prompt", nargs="?", help="the text to go on from")
    parser.add_argument("--prompt-ids", help="the prompt as token ids with commas between")
    parser.add_argument("--max-tokens", type=int, default=64, help="write at most this many tokens (%(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0: the most likely token each time (%(default)s)"
    )
    parser.add_argument("--top-k", type=int, default=0, help="choose from the k most likely tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, help="choose from the tokens that hold this probability")
    parser.add_argument("--seed", type=int, help="of the sampling")
    parser.add_argument("--device", help="such as cuda:1")
    parser.add_argument("--threads", type=int, help="of the CPU; default: one a physical core")
    parser.add_argument("--ids", action="store_true", help="print token ids instead of text")
    parser.add_argument("--benchmark", action="store_true", help="time prefill and decode")
    parser.add_argument("--prompt-tokens", type=int, default=322, help="prompt of the benchmark (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="repeats of the benchmark (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the benchmark's figures to this file")
    options = parser.parse_args()
    _enter_bundle()
    from gpt2_tvm.cli import describe

    try:
        if options.benchmark:
            _benchmark(options)
        else:
            _generate(options)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        _fail(describe(error))


def _fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(1)


def _enter_bundle() -> None:
    """Check Python and platform, and put the bundle's packages in front of this machine's."""
    made_for = json.loads((HERE / "bundle.json").read_text(encoding="utf-8"))
    python, platform = "{}.{}".format(*sys.version_info), sysconfig.get_platform()
    if python != made_for["python"] or platform != made_for["platform"]:
        _fail(
            f"this bundle is for Python {made_for['python']} on {made_for['platform']}, and this is Python {python} on "
            f"{platform}; run it there, or make one with this Python: python -m gpt2_tvm.pack"
        )
    try:
        import numpy  # noqa: F401
    except ImportError:
        _fail("this bundle needs numpy; install it (pip install numpy, or your system's package)")
    os.environ["TVM_USE_RUNTIME_LIB"] = "1"
    # tvm_ffi would import a torch that is installed here, for an exchange of tensors that we do not make: seconds
    os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")
    sys.path.insert(0, str(HERE / "lib"))


def _generate(options: argparse.Namespace) -> None:
    from gpt2_tvm.decoding.tokens import Generation
    from gpt2_tvm.engine import Engine
    from gpt2_tvm.errors import UserError
    from gpt2_tvm.tokenizer import load_tokenizer

    engine = Engine(HERE / "artifact", options.device, threads=options.threads)
    folder = engine.artifact.tokenizer
    tokenizer = load_tokenizer(folder) if folder else None
    if options.prompt_ids:
        try:
            ids = [int(part) for part in options.prompt_ids.split(",")]
        except ValueError:
            raise UserError(f"--prompt-ids {options.prompt_ids}: give integers with commas between") from None
    elif options.prompt is None:
        raise UserError('there is no prompt; give one: python run.py "It is a truth"')
    elif tokenizer is None:
        raise UserError("this model has no tokenizer; give token ids with --prompt-ids 1,2,3")
    else:
        ids = tokenizer.encode(options.prompt)
    sampling = (options.temperature, options.top_k, options.top_p, options.seed)
    generation = Generation(engine, ids, options.max_tokens, *sampling, tokenizer.eos_id if tokenizer else None)
    text = tokenizer.stream(skip_special=True) if tokenizer and not options.ids else None
    for token in generation:
        print(text.push(token) if text else f"{token} ", end="", flush=True)
    print(text.finish() if text else "")
    if generation.finish == "context":
        print("the context is full: stopped there", file=sys.stderr)
    if generation.steps:
        print(f"decode {generation.steps / generation.decode_s:.1f} tokens/s", file=sys.stderr)


def _benchmark(options: argparse.Namespace) -> None:
    """Prefill and decode at batch 1: medians over the repeats, after one warm-up of each."""
    import numpy as np

    from gpt2_tvm.engine import Engine
    from gpt2_tvm.errors import UserError

    if options.repeats < 1 or options.prompt_tokens < 1 or options.max_tokens < 1:
        raise UserError("--repeats, --prompt-tokens and --max-tokens must be at least 1")
    engine = Engine(HERE / "artifact", options.device, threads=options.threads)
    generate = min(options.max_tokens, engine.max_seq_len - 1)
    length = min(options.prompt_tokens, engine.max_seq_len - generate)
    prompt = np.random.default_rng(0).integers(engine.config.vocab_size, size=length)
    prefill_tok_s, decode_tok_s = [], []
    for repeat in range(options.repeats + 1):
        engine.reset()
        start = time.perf_counter()
        engine.prefill(prompt)
        middle = time.perf_counter()
        engine.decode_greedy(generate)
        end = time.perf_counter()
        if repeat:
            prefill_tok_s.append(length / (middle - start))
            decode_tok_s.append(generate / (end - middle))
    manifest = engine.artifact.manifest
    row = {
        "model": manifest["model"],
        "target": manifest["target"]["name"],
        "device": engine.runner.device_name,
        "threads": engine.threads,
        "quantization": manifest["quantization"],
        "batch": 1,
        "prompt_tokens": length,
        "generate_tokens": generate,
        "repeats": options.repeats,
        "prefill_tok_s": round(statistics.median(prefill_tok_s), 2),
        "decode_tok_s": round(statistics.median(decode_tok_s), 2),
        "prefill_tok_s_sd": round(statistics.pstdev(prefill_tok_s), 2),
        "decode_tok_s_sd": round(statistics.pstdev(decode_tok_s), 2),
        "versions": manifest["versions"],
    }
    if options.json:
        options.json.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    print(f"{row['model']} {row['quantization']} on {row['device']}, medians of {options.repeats}:")
    print(f"prefill of {length} tokens {row['prefill_tok_s']} tokens/s")
    print(f"decode of {generate} tokens {row['decode_tok_s']} tokens/s")


if __name__ == "__main__":
    main()
