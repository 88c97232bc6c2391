// One instruction each, where CUDA C++ has no name for it or leaves its compiler too much freedom.
//
// Before this file stand the sizes of the model and of the grid (kernels/persistent/source.py).

namespace gpt2_step {

constexpr int LANES = 32, WARPS = THREADS / LANES, ROWS_AT_ONCE = GRID * WARPS;
constexpr unsigned ALL = 0xffffffffu;

// Elements of a weight that one load of 16 bytes brings.
constexpr int VEC = 16 / sizeof(number);

__host__ __device__ constexpr int steps_of(int size, int step) { return (size + step - 1) / step; }

__device__ __forceinline__ unsigned shared_address(const void *at) { return (unsigned)__cvta_generic_to_shared(at); }

// 16 bytes to shared memory, past registers and L1; arrived once `arrived` says so.
__device__ __forceinline__ void copy_16(void *to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void end_of_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Of this thread's groups of copies all but the latest LEFT are there.
template <int LEFT> __device__ __forceinline__ void arrived() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// What other blocks wrote lies in L2, never in this multiprocessor's L1. `volatile`: the same address holds another
// value after the next barrier, so no two of these loads are one.
__device__ __forceinline__ float load(const float *from) {
  float value;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(from) : "memory");
  return value;
}
__device__ __forceinline__ float4 load_4(const float *from) {
  float4 value;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "l"(from)
               : "memory");
  return value;
}
__device__ __forceinline__ uint4 load_16(const void *from) {
  uint4 value;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from)
               : "memory");
  return value;
}
__device__ __forceinline__ void to_l2(const void *from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from) : "memory");
}

// An element of a parameter, which nothing writes. The pointers come from a table: only `__ldg` says what they point to.
__device__ __forceinline__ float parameter(const number *at) {
#ifdef GPT2_STEP_HALF
  return __half2float(__ldg(at));
#else
  return __ldg(at);
#endif
}
__device__ __forceinline__ void store(float value, number *to) {
#ifdef GPT2_STEP_HALF
  *to = __float2half_rn(value);
#else
  *to = value;
#endif
}

// The VEC elements of 16 bytes.
__device__ __forceinline__ void spread(const uint4 &bytes, float (&to)[VEC]) {
#ifdef GPT2_STEP_HALF
  const half2 *pairs = reinterpret_cast<const half2 *>(&bytes);
#pragma unroll
  for (int i = 0; i < VEC / 2; ++i) {
    const float2 pair = __half22float2(pairs[i]);
    to[2 * i] = pair.x, to[2 * i + 1] = pair.y;
  }
#else
  const float *values = reinterpret_cast<const float *>(&bytes);
#pragma unroll
  for (int i = 0; i < VEC; ++i) to[i] = values[i];
#endif
}

// Sums and maxima of a warp, or of neighbouring `WIDTH` lanes of it; all of them get the result.
template <int WIDTH = LANES> __device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int by = WIDTH / 2; by > 0; by /= 2) value += __shfl_xor_sync(ALL, value, by);
  return value;
}

// ---- the barrier of the whole grid

// Bit 31 turns over when the last block has arrived; the bits below count the others and are 0 again then. So nothing
// has to be reset between two barriers, nor between two launches, and no number of them overflows it.
__device__ unsigned arrivals;
constexpr unsigned TURN = 0x80000000u;

// Only sound where all blocks are resident: the launch is a cooperative one, which CUDA refuses otherwise. A thread of
// the last warp goes to it for its block: that warp has the fewest rows, and a release may wait for its loads.
constexpr int MESSENGER = (WARPS - 1) * LANES;
struct Barrier {
  unsigned before;  // bit 31 as it stands until all have arrived; of the messenger alone

  __device__ __forceinline__ static unsigned now() {
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(&arrivals) : "memory");
    return value & TURN;
  }
  __device__ __forceinline__ void begin() { before = now(); }  // stays so until this block arrives too
  // What this block wrote is for the others to see. It may go on with what needs nothing of them.
  __device__ __forceinline__ void arrive() {
    __syncthreads();
    if (threadIdx.x == MESSENGER) {
      const unsigned one = blockIdx.x == 0 ? TURN - (GRID - 1) : 1u;
      asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(&arrivals), "r"(one) : "memory");
    }
  }
  __device__ __forceinline__ void wait() {
    if (threadIdx.x == MESSENGER) {
      while (now() == before) GPT2_STEP_SPIN;
      before ^= TURN;
    }
    __syncthreads();
  }
};

}  // namespace gpt2_step
