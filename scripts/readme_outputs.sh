#!/bin/sh
# Run the commands that README shows, keep what they print in artifacts/records/readme/, and quote it in README.
# For numbers worth quoting: a quiet machine, and an environment made by `make test` (the benchmark's peer is transformers).
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
records=artifacts/records/readme
mkdir -p "$records"

# record FILE COMMAND...: what the command prints on stdout; progress stays on the terminal
record() {
    file=$1; shift
    echo "==> $*"
    "$@" > "$records/$file.part"
    mv "$records/$file.part" "$records/$file"
}

# What stands in README without a long measurement, and the short benchmark
basics() {
    record compile.txt python -m gpt2_tvm.compile --model bundled --output artifacts/austen
    record generate.txt python -m gpt2_tvm.generate artifacts/austen "It is a truth universally acknowledged, that" \
        --max-tokens 120 --temperature 0.7 --top-p 0.9 --seed 3
    record targets.txt python -m gpt2_tvm.compile --list-targets
    record compile-gpt2.txt python -m gpt2_tvm.compile --model gpt2 --output artifacts/gpt2-q0f32-cpu

    # A program beside it costs the peer, whose threads spin, far more than us: such a table is not quoted.
    new=$(mktemp)
    record benchmark.md.new python -m gpt2_tvm.benchmark artifacts/gpt2-q0f32-cpu artifacts/austen --peer transformers --repeats 7 \
        --json "$new"
    if python -c "import json, sys; sys.exit(json.load(open('$new'))['other_cores'] > 0.25)"; then
        mv "$records/benchmark.md.new" "$records/benchmark.md"
        mv "$new" "$records/benchmark.json"
        chmod 644 "$records/benchmark.json"
    else
        cat "$records/benchmark.md.new"
        rm -f "$records/benchmark.md.new" "$new"
        echo "not quoted: other programs were busy meanwhile; run this again on a quiet machine" >&2
    fi
}

# The tables of the laboratory, from records that were measured before: the commands are in artifacts/records/README.md
laboratory() {
    for target in cpu webgpu; do
        extra="--target $target"
        [ "$target" = webgpu ] || extra="--full-factorial --factors cpu-matmul,cpu-gemv,cpu-reduction"  # no set more than without
        # shellcheck disable=SC2086
        record "ablation-$target.md" python -m tuning.ablation --model bundled $extra --report \
            --records "artifacts/records/ablation-$target.json" --against "artifacts/records/ablation-$target-second-run.json" --figure "artifacts/figures/ablation-$target.png"
    done
    record sweep-webgpu.md python -m tuning.heatmap artifacts/records/webgpu/bundled-gemv.jsonl --output artifacts/figures/sweep-webgpu
    for target in rtx-4090 h200; do  # marked: the 2023 study's best point on a 4090
        record "sweep-static-$target.md" python -m tuning.heatmap "artifacts/records/static/$target-gemv.jsonl" \
            --output "artifacts/figures/sweep-static-$target" --mark TS=8,TR=16,TILE_S=1,TILE_R=8
        sets=baseline,only-matmul,only-gemv,only-reduction,only-general-reduction,stock,full,without-norm-gemv,without-wide-gemv,without-tensor-matmul,with-persistent
        [ "$target" = h200 ] && sets=$sets,with-wgmma-matmul
        record "static-$target.md" python -m tuning.ablation --model gpt2 --target "$target" --quantization q0f16 --static --sets "$sets"
    done
}

case "${1:-all}" in
    basics) basics ;;
    laboratory) laboratory ;;
    quote) ;;
    all) basics; laboratory ;;
    *) echo "usage: $0 [basics|laboratory|quote|all]" >&2; exit 2 ;;
esac
python scripts/quote_records.py
