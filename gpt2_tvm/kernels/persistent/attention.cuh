// Attention of the one new row. A head's slots are shared out to several blocks (splits), each with an online softmax;
// every block merges the splits of all heads for itself when it needs them, which costs less than one more barrier.

namespace gpt2_step {

__host__ __device__ constexpr int lanes_for(int size, int lanes = 1) {
  return lanes * VEC >= size ? lanes : lanes_for(size, lanes * 2);
}
constexpr int LANES_A_SLOT = lanes_for(HEAD_DIM);
constexpr int GROUPS = THREADS / LANES_A_SLOT;  // of lanes; each takes every GROUPS-th slot of a split
constexpr int AT_ONCE = 4;                      // slots whose keys and values are on their way together
constexpr int PART = HEAD_DIM + 2;              // weighted sum of values, then maximum, sum of weights
constexpr float NOTHING = -1e30f;               // a maximum of no scores; finite, so that two of them subtract to 0
static_assert(LANES_A_SLOT <= LANES && HEAD_DIM % VEC == 0, "a slot is one warp's");

struct Work {  // in global memory, float32
  float *query, *parts, *after_attention, *after_mlp, *inner;
};

struct Slots {
  int live, splits, share;

  // The splits are as many as the live slots can feed: merging them costs every block.
  __device__ __forceinline__ void count(int slots) {
    live = slots;
    splits = max(1, min(SPLITS, steps_of(live, GROUPS)));
    share = steps_of(live, splits);
  }
  __device__ __forceinline__ int begin(int split) const { return min(live, split * share); }
  __device__ __forceinline__ int end(int split) const { return min(live, split * share + share); }
};

__device__ __forceinline__ const unsigned char *slot_of(const number *cache, int which, int head, int slot) {
  return reinterpret_cast<const unsigned char *>(cache + ((long long)(which * HEADS + head) * CAPACITY + slot) * HEAD_DIM);
}

// The slots that this block will look at come from memory to L2 while it multiplies.
__device__ __forceinline__ void fetch_slots(const Slots &slots, const number *cache) {
  constexpr int LINE = 128;
  for (int task = blockIdx.x; task < HEADS * slots.splits; task += GRID) {
    const int head = task % HEADS, begin = slots.begin(task / HEADS), end = slots.end(task / HEADS);
    const int lines = steps_of((end - begin) * HEAD_DIM * (int)sizeof(number), LINE);
    for (int i = threadIdx.x; i < 2 * lines; i += THREADS)
      to_l2(slot_of(cache, i / lines, head, begin) + i % lines * LINE);
  }
}

__device__ __forceinline__ void merge(float (&sum)[VEC], float &top, float &total, const float (&other)[VEC],
                                      float other_top, float other_total) {
  const float both = fmaxf(top, other_top), mine = exp2f(top - both), others = exp2f(other_top - both);
  top = both, total = total * mine + other_total * others;
#pragma unroll
  for (int k = 0; k < VEC; ++k) sum[k] = sum[k] * mine + other[k] * others;
}

// scale: of scores, times log2(e). meet: shared, [WARPS][PART].
__device__ __forceinline__ void attend(const Slots &slots, const number *cache, float scale, const Work &work,
                                       float *meet) {
  const int lane = threadIdx.x % LANES, part = threadIdx.x % LANES_A_SLOT, group = threadIdx.x / LANES_A_SLOT;
  const bool used = part * VEC < HEAD_DIM;
  for (int task = blockIdx.x; task < HEADS * slots.splits; task += GRID) {
    const int head = task % HEADS, split = task / HEADS, end = slots.end(split);
    float query[VEC], sum[VEC], top = NOTHING, total = 0.f;
#pragma unroll
    for (int k = 0; k < VEC; k += 4) {
      const float4 four = used ? load_4(work.query + head * HEAD_DIM + part * VEC + k) : make_float4(0.f, 0.f, 0.f, 0.f);
      query[k] = four.x * scale, query[k + 1] = four.y * scale, query[k + 2] = four.z * scale;
      query[k + 3] = four.w * scale;
      sum[k] = sum[k + 1] = sum[k + 2] = sum[k + 3] = 0.f;
    }
    for (int slot0 = slots.begin(split); slot0 < end; slot0 += AT_ONCE * GROUPS) {
      uint4 keys[AT_ONCE], values[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        const int slot = slot0 + i * GROUPS + group;
        keys[i] = values[i] = make_uint4(0u, 0u, 0u, 0u);
        if (slot < end && used) {
          keys[i] = load_16(slot_of(cache, 0, head, slot) + part * 16);
          values[i] = load_16(slot_of(cache, 1, head, slot) + part * 16);
        }
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        float key[VEC], value[VEC], score = 0.f;
        spread(keys[i], key), spread(values[i], value);
#pragma unroll
        for (int k = 0; k < VEC; ++k) score += key[k] * query[k];
        score = warp_sum<LANES_A_SLOT>(score);
        if (slot0 + i * GROUPS + group < end) merge(sum, top, total, value, score, 1.f);
      }
    }
    // The groups of a warp meet, then the warps.
#pragma unroll
    for (int by = LANES_A_SLOT; by < LANES; by *= 2) {
      float other[VEC];
#pragma unroll
      for (int k = 0; k < VEC; ++k) other[k] = __shfl_xor_sync(ALL, sum[k], by);
      const float other_top = __shfl_xor_sync(ALL, top, by), other_total = __shfl_xor_sync(ALL, total, by);
      merge(sum, top, total, other, other_top, other_total);
    }
    float *mine = meet + threadIdx.x / LANES * PART;
    if (lane < LANES_A_SLOT && used) {
#pragma unroll
      for (int k = 0; k < VEC; ++k) mine[part * VEC + k] = sum[k];
      if (part == 0) mine[HEAD_DIM] = top, mine[HEAD_DIM + 1] = total;
    }
    __syncthreads();
    float *out = work.parts + (head * SPLITS + split) * PART;
    for (int d = threadIdx.x; d < HEAD_DIM; d += THREADS) {
      float both = NOTHING, value = 0.f, weights = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) both = fmaxf(both, meet[w * PART + HEAD_DIM]);
#pragma unroll
      for (int w = 0; w < WARPS; ++w) {
        const float factor = exp2f(meet[w * PART + HEAD_DIM] - both);
        value += factor * meet[w * PART + d], weights += factor * meet[w * PART + HEAD_DIM + 1];
      }
      out[d] = value;
      if (d == 0) out[HEAD_DIM] = both, out[HEAD_DIM + 1] = weights;
    }
    __syncthreads();  // `meet` is the next task's
  }
}

// The merged attention of all heads, into x [EMBED]. factors: shared, [HEADS][SPLITS].
__device__ __forceinline__ void merge_splits(const Slots &slots, const Work &work, float *factors, float *x) {
  float found[A_THREAD][SPLITS];  // all on their way before any is needed
#pragma unroll
  for (int i = 0; i < A_THREAD; ++i) {
    const int e = i * THREADS + threadIdx.x;
#pragma unroll
    for (int s = 0; s < SPLITS; ++s)
      found[i][s] = e < EMBED && s < slots.splits ? load(work.parts + (e / HEAD_DIM * SPLITS + s) * PART + e % HEAD_DIM)
                                                  : 0.f;
  }
  for (int head = threadIdx.x; head < HEADS; head += THREADS) {
    const float *last = work.parts + head * SPLITS * PART + HEAD_DIM;
    float tops[SPLITS], totals[SPLITS], both = NOTHING, total = 0.f;
#pragma unroll
    for (int s = 0; s < SPLITS; ++s) {
      tops[s] = s < slots.splits ? load(last + s * PART) : NOTHING;
      totals[s] = s < slots.splits ? load(last + s * PART + 1) : 0.f;
      both = fmaxf(both, tops[s]);
    }
#pragma unroll
    for (int s = 0; s < SPLITS; ++s) total += totals[s] * exp2f(tops[s] - both);
#pragma unroll
    for (int s = 0; s < SPLITS; ++s)
      if (s < slots.splits) factors[head * SPLITS + s] = total > 0.f ? exp2f(tops[s] - both) / total : 0.f;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < A_THREAD; ++i) {
    const int e = i * THREADS + threadIdx.x;
    if (e >= EMBED) break;
    float value = 0.f;
#pragma unroll
    for (int s = 0; s < SPLITS; ++s)
      if (s < slots.splits) value += found[i][s] * factors[e / HEAD_DIM * SPLITS + s];
    x[place<EMBED>(e)] = value;
  }
  __syncthreads();
}

}  // namespace gpt2_step
