// Matrix products of a warp as CUDA C++ has them (nvcuda::wmma); included by cuda_on_cpu.h.
#pragma once
#include <functional>
#include <type_traits>

namespace nvcuda::wmma {
struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

// Every thread holds the whole 16 x 16 fragment: what is spread over a warp on a GPU is nowhere to be seen from here.
template <typename Use, int M, int N, int K, typename T, typename Layout = row_major> struct fragment { T at[16][16]; };

template <typename F, typename T> void fill_fragment(F &f, T value) {
  for (auto &row : f.at)
    for (auto &x : row) x = value;
}
template <typename Use, typename T, typename Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout> &f, const T *from, unsigned stride) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j)
      f.at[i][j] = std::is_same_v<Layout, row_major> ? from[i * stride + j] : from[j * stride + i];
}
template <typename A, typename B, typename C>
void mma_sync(C &d, const A &a, const B &b, const C &c) {
  float sums[16][16];
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) sums[i][j] = c.at[i][j];
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 16; ++j) sums[i][j] += (float)a.at[i][k] * (float)b.at[k][j];
  }
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) d.at[i][j] = sums[i][j];
}
template <typename F, typename T> void store_matrix_sync(T *to, const F &f, unsigned stride, layout_t) {
  std::function<void(int)> operation = [&](int turn) {
    if (turn == 0)
      for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 16; ++j) to[i * stride + j] = f.at[i][j];
  };
  emulated::warp("store_matrix", operation);
}
}  // namespace nvcuda::wmma
