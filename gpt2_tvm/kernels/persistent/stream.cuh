// The weights, as one stream: what a thread will need of them, in order, from the first product to the last, is known
// before the step begins. So it asks for them without regard to layers and barriers, as far ahead as its ring in shared
// memory reaches, and a barrier finds the memory busy.
//
// A row of a weight is one warp's; row r of a product is warp r % ROWS_AT_ONCE's, counted so that neighbouring rows lie
// on different multiprocessors. A lane takes every 32nd 16 bytes of a row: each load of a warp is 512 bytes in one
// piece. What a thread copies only that thread reads, so the ring needs no synchronisation at all.

namespace gpt2_step {

// Pointers, in shared memory: `OF_LAYER` for each layer, then those of the model.
enum OfLayer {
  LN1_WEIGHT, LN1_BIAS, QKV_WEIGHT, QKV_BIAS, PROJ_WEIGHT, PROJ_BIAS,
  LN2_WEIGHT, LN2_BIAS, FC_WEIGHT, FC_BIAS, OUT_WEIGHT, OUT_BIAS, CACHE, OF_LAYER
};
enum OfModel { TOKENS, PLACES, LNF_WEIGHT, LNF_BIAS, HEAD, OF_MODEL };

__device__ __forceinline__ const number *pointer(const void *const *table, int layer, int which) {
  return static_cast<const number *>(table[layer * OF_LAYER + which]);
}

__device__ __forceinline__ int first_row() { return (threadIdx.x / LANES) * GRID + blockIdx.x; }

struct Stream {
  const void *const *table;
  unsigned char *ring;  // of this thread: [DEPTH][PACKET], THREADS * 16 bytes apart
  // to ask for next
  const unsigned char *at;
  int product, packet, row, rows, vectors;
  int asked, taken;  // places in the ring

  __device__ __forceinline__ void begin(const void *const *pointers, unsigned char *shared) {
    table = pointers, ring = shared + threadIdx.x * 16;
    product = -1, asked = taken = 0;
    next_product();
    for (int i = 0; i < DEPTH; ++i) ask();
  }

  // The next product of which this warp has a row; past the last one `rows` is 0.
  __device__ __forceinline__ void next_product() {
    do {
      ++product;
      const int layer = product / 4, of = product % 4;
      row = first_row();
      if (layer >= LAYERS) {
        rows = of ? 0 : VOCAB, vectors = EMBED / VEC;
        at = static_cast<const unsigned char *>(table[LAYERS * OF_LAYER + HEAD]);
      } else {
        rows = of == 0 ? 3 * EMBED : of == 2 ? INNER : EMBED;
        vectors = (of == 3 ? INNER : EMBED) / VEC;
        const int which = of == 0 ? QKV_WEIGHT : of == 1 ? PROJ_WEIGHT : of == 2 ? FC_WEIGHT : OUT_WEIGHT;
        at = static_cast<const unsigned char *>(table[layer * OF_LAYER + which]);
      }
      packet = 0;
      at += ((long long)row * vectors + threadIdx.x % LANES) * 16;
    } while (row >= rows && rows > 0);
  }

  // The next packet: up to PACKET loads, one group (an empty one at the end, so that `take` can count).
  __device__ __forceinline__ void ask() {
    if (rows > 0) {
#pragma unroll
      for (int i = 0; i < PACKET; ++i) {
        const int vector = (packet * PACKET + i) * LANES + (int)(threadIdx.x % LANES);
        if (vector < vectors) copy_16(ring + (asked * PACKET + i) * (THREADS * 16), at + i * (LANES * 16));
      }
      ++packet, at += PACKET * LANES * 16;
      if (packet * PACKET * LANES >= vectors) {
        at += ((long long)ROWS_AT_ONCE * vectors - packet * PACKET * LANES) * 16;
        packet = 0, row += ROWS_AT_ONCE;
        if (row >= rows) next_product();
      }
    }
    end_of_group();
    asked = asked + 1 == DEPTH ? 0 : asked + 1;
  }

  // The oldest packet, which has arrived then; `ask` may write over it once it is in registers.
  __device__ __forceinline__ void take(uint4 (&to)[PACKET]) {
    arrived<DEPTH - 1>();
#pragma unroll
    for (int i = 0; i < PACKET; ++i)
      to[i] = *reinterpret_cast<const uint4 *>(ring + (taken * PACKET + i) * (THREADS * 16));
    taken = taken + 1 == DEPTH ? 0 : taken + 1;
  }
};

// ---- y = W x: x in shared memory, W from the stream

// Where element e of x [K] lies: the first four of all vectors, then the next four, so that a warp's loads of float4
// meet no bank twice.
template <int K> __device__ __forceinline__ int place(int e) {
  return e % VEC / 4 * (K / VEC * 4) + e / VEC * 4 + e % 4;
}

template <int K> __device__ __forceinline__ void read_x(const float *x, int vector, float (&to)[VEC]) {
#pragma unroll
  for (int part = 0; part < VEC / 4; ++part) {
    const float4 four = *reinterpret_cast<const float4 *>(x + part * (K / VEC * 4) + vector * 4);
    to[part * 4] = four.x, to[part * 4 + 1] = four.y, to[part * 4 + 2] = four.z, to[part * 4 + 3] = four.w;
  }
}

// What lane i adds to the i-th row of its warp: asked for before a barrier, needed after it.
template <int N> __device__ __forceinline__ float bias_of(const number *bias, int first) {
  const int row = first + (int)(threadIdx.x % LANES) * ROWS_AT_ONCE;
  return row < N ? parameter(bias + row) : 0.f;
}

// finish(row, sum) once for every row of this warp, sum = W[row] . x (+ bias), a lane for each of up to 32 rows.
// bias: of the first 32 rows, by `bias_of`; from: where the others lie, nullptr for none.
template <int N, int K, typename Finish>
__device__ __forceinline__ void multiply(Stream &stream, const float *x, float bias, const number *from,
                                         Finish finish) {
  constexpr int VECTORS = K / VEC, A_LANE = steps_of(VECTORS, LANES), PACKETS = steps_of(A_LANE, PACKET);
  // A lane's columns are the same in all of its rows: in registers where there are rows enough to pay for it.
  constexpr bool KEPT = A_LANE * VEC <= 64 && N > ROWS_AT_ONCE;
  const int lane = threadIdx.x % LANES;
  float kept[KEPT ? A_LANE : 1][VEC];
  if constexpr (KEPT) {
#pragma unroll
    for (int i = 0; i < A_LANE; ++i)
      if (VECTORS % LANES == 0 || i * LANES + lane < VECTORS) read_x<K>(x, i * LANES + lane, kept[i]);
  }
  for (int first = first_row(); first < N; first += LANES * ROWS_AT_ONCE) {
    const int count = min(LANES, steps_of(N - first, ROWS_AT_ONCE));
    if (from != nullptr && first != first_row()) bias = bias_of<N>(from, first);
    float mine = 0.f;
    for (int i = 0; i < count; ++i) {
      float sum = 0.f;
#pragma unroll(KEPT ? PACKETS : 1)
      for (int packet = 0; packet < PACKETS; ++packet) {
        uint4 weights[PACKET];
        stream.take(weights);
#pragma unroll
        for (int j = 0; j < PACKET; ++j) {
          const int at = packet * PACKET + j;
          if (at >= A_LANE || (VECTORS % LANES != 0 && at * LANES + lane >= VECTORS)) continue;
          float w[VEC];
          spread(weights[j], w);
          if constexpr (KEPT) {
#pragma unroll
            for (int k = 0; k < VEC; ++k) sum += w[k] * kept[at < A_LANE ? at : 0][k];
          } else {
            float part[VEC];
            read_x<K>(x, at * LANES + lane, part);
#pragma unroll
            for (int k = 0; k < VEC; ++k) sum += w[k] * part[k];
          }
        }
        stream.ask();
      }
      sum = warp_sum(sum);
      if (lane == i) mine = sum;
    }
    if (lane < count) finish(first + lane * ROWS_AT_ONCE, mine + bias);
  }
}

}  // namespace gpt2_step
