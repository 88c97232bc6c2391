// One decode step of GPT-2 for one sequence. Five phases a layer, a barrier of the grid after each:
//
//   1. LayerNorm, qkv = c_attn; keys and values go to the cache       4. LayerNorm, MLP in, activation
//   2. attention, a head's slots in splits                            5. MLP out, residual
//   3. splits merged, c_proj, residual
//
// then LayerNorm and the head. Every block keeps the residual row and does the LayerNorms for itself. What a phase
// needs beside the other blocks' results (bias, LayerNorm's parameters) it asks for before it waits for them.

namespace gpt2_step {

struct Norm {  // LayerNorm's parameters, this thread's share of the row
  float weight[A_THREAD], bias[A_THREAD];

  __device__ __forceinline__ void ask(const number *weights, const number *biases) {
#pragma unroll
    for (int i = 0; i < A_THREAD; ++i) {
      const int e = i * THREADS + threadIdx.x;
      weight[i] = e < EMBED ? parameter(weights + e) : 0.f, bias[i] = e < EMBED ? parameter(biases + e) : 0.f;
    }
  }
};

// Of all threads of the block. meet: shared, [WARPS], not in use by a call before.
__device__ __forceinline__ float block_sum(float value, float *meet) {
  value = warp_sum(value);
  if (threadIdx.x % LANES == 0) meet[threadIdx.x / LANES] = value;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) total += meet[w];
  return total;
}

struct Shared {  // of a block
  unsigned char *ring;
  float *residual, *x, *factors, *meet;  // [EMBED], [WIDEST], [HEADS * SPLITS], [2 * WARPS]
};

// This thread's share of the residual row -> kept, and normalised into x.
__device__ __forceinline__ void normalise(const float (&row)[A_THREAD], const Norm &norm, const Shared &shared) {
  float total = 0.f, square = 0.f;
#pragma unroll
  for (int i = 0; i < A_THREAD; ++i) total += row[i];
  const float mean = block_sum(total, shared.meet) / EMBED;
#pragma unroll
  for (int i = 0; i < A_THREAD; ++i)
    if (i * THREADS + (int)threadIdx.x < EMBED) square += (row[i] - mean) * (row[i] - mean);
  const float rstd = rsqrtf(block_sum(square, shared.meet + WARPS) / EMBED + EPSILON);
#pragma unroll
  for (int i = 0; i < A_THREAD; ++i) {
    const int e = i * THREADS + threadIdx.x;
    if (e >= EMBED) break;
    shared.residual[e] = row[i];
    shared.x[place<EMBED>(e)] = (row[i] - mean) * rstd * norm.weight[i] + norm.bias[i];
  }
  __syncthreads();
}

__device__ __forceinline__ void load_row(const float *from, float (&row)[A_THREAD]) {
#pragma unroll
  for (int i = 0; i < A_THREAD; ++i) {
    const int e = i * THREADS + threadIdx.x;
    row[i] = e < EMBED ? load(from + e) : 0.f;
  }
}

__device__ __forceinline__ void run(const void *const *table, const int *ids, const int *positions, const int *lengths,
                                    float *logits, const Work &work, const Shared &shared) {
  Stream stream;
  Barrier barrier;
  stream.begin(table, shared.ring);
  barrier.begin();
  const int token = ids[0], position = positions[0];
  const bool takes_part = lengths[0] > 0;
  const bool writes = takes_part && position >= 0 && position < CAPACITY;
  Slots slots;
  slots.count(takes_part ? max(0, min(position + 1, CAPACITY)) : 0);
  const number *tokens = pointer(table, LAYERS, TOKENS) + (long long)token * EMBED;
  const number *places = pointer(table, LAYERS, PLACES) + (long long)min(position, POSITIONS - 1) * EMBED;
  float row[A_THREAD];
  Norm norm;
#pragma unroll
  for (int i = 0; i < A_THREAD; ++i) {
    const int e = i * THREADS + threadIdx.x;
    row[i] = e < EMBED ? parameter(tokens + e) + parameter(places + e) : 0.f;
  }

#pragma unroll 1
  for (int layer = 0; layer < LAYERS; ++layer) {
    number *cache = const_cast<number *>(pointer(table, layer, CACHE));
    norm.ask(pointer(table, layer, LN1_WEIGHT), pointer(table, layer, LN1_BIAS));
    float bias = bias_of<3 * EMBED>(pointer(table, layer, QKV_BIAS), first_row());
    fetch_slots(slots, cache);
    if (layer > 0) {
      barrier.wait();
      load_row(work.after_mlp, row);
    }
    normalise(row, norm, shared);
    multiply<3 * EMBED, EMBED>(stream, shared.x, bias, pointer(table, layer, QKV_BIAS), [&](int out, float value) {
      const int which = out / EMBED, e = out % EMBED;  // query, key, value
      if (which == 0) work.query[e] = value;
      else if (writes)
        store(value, cache + ((long long)((which - 1) * HEADS + e / HEAD_DIM) * CAPACITY + position) * HEAD_DIM +
                         e % HEAD_DIM);
    });
    barrier.arrive();

    barrier.wait();
    attend(slots, cache, scale_of(layer), work, shared.x);
    barrier.arrive();

    bias = bias_of<EMBED>(pointer(table, layer, PROJ_BIAS), first_row());
    barrier.wait();
    merge_splits(slots, work, shared.factors, shared.x);
    multiply<EMBED, EMBED>(stream, shared.x, bias, pointer(table, layer, PROJ_BIAS), [&](int out, float value) {
      work.after_attention[out] = shared.residual[out] + value;
    });
    barrier.arrive();

    norm.ask(pointer(table, layer, LN2_WEIGHT), pointer(table, layer, LN2_BIAS));
    bias = bias_of<INNER>(pointer(table, layer, FC_BIAS), first_row());
    barrier.wait();
    load_row(work.after_attention, row);
    normalise(row, norm, shared);
    multiply<INNER, EMBED>(stream, shared.x, bias, pointer(table, layer, FC_BIAS),
                           [&](int out, float value) { work.inner[out] = activated(value); });
    barrier.arrive();

    bias = bias_of<EMBED>(pointer(table, layer, OUT_BIAS), first_row());
    barrier.wait();
    for (int e = threadIdx.x * 4; e < INNER; e += THREADS * 4)
      *reinterpret_cast<float4 *>(shared.x + place<INNER>(e)) = load_4(work.inner + e);
    __syncthreads();
    multiply<EMBED, INNER>(stream, shared.x, bias, pointer(table, layer, OUT_BIAS), [&](int out, float value) {
      work.after_mlp[out] = shared.residual[out] + value;
    });
    barrier.arrive();
  }

  norm.ask(pointer(table, LAYERS, LNF_WEIGHT), pointer(table, LAYERS, LNF_BIAS));
  barrier.wait();
  load_row(work.after_mlp, row);
  normalise(row, norm, shared);
  multiply<VOCAB, EMBED>(stream, shared.x, 0.f, nullptr, [&](int out, float value) { logits[out] = value; });
}

}  // namespace gpt2_step
