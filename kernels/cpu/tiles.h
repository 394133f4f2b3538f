// Products of small matrices whose sums stay in vector registers.

#ifndef IRO_JAX_KERNELS_CPU_TILES_H_
#define IRO_JAX_KERNELS_CPU_TILES_H_

#include <algorithm>
#include <cstdint>

namespace iro_jax {

// Lanes of a vector, and the tiles that fit into its registers: rows x vectors sums, a row of the
// other factor, and one number of the first.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 8, kWideRows = 6, kWide = 4;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRows = 8, kWideRows = 6, kWide = 4;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRows = 4, kWideRows = 4, kWide = 2;
#else
constexpr int kLanes = 4, kRows = 4, kWideRows = 4, kWide = 2;
#endif
constexpr int kVectors = 3;
constexpr int64_t kColumns = kVectors * kLanes;

typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline const Vector& At(const float* x) { return *reinterpret_cast<const Vector*>(x); }
inline Vector& At(float* x) { return *reinterpret_cast<Vector*>(x); }

constexpr int64_t Parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// Steps of a tile between two calls of what is done beside it.
constexpr int64_t kStretch = 16;

struct Nothing {
  void operator()() const {}
};

// Rows of a matrix, one every `distance` numbers.
template <typename Number>
struct Every {
  Number* first;
  int64_t distance;

  Number* operator()(int64_t row) const { return first + row * distance; }
  Every From(int64_t row) const { return {(*this)(row), distance}; }
};

// Rows of a matrix whose numbers are listed.
template <typename Number>
struct Listed {
  Number* first;
  int64_t distance;
  const int32_t* list;

  Number* operator()(int64_t row) const { return first + list[row] * distance; }
  Listed From(int64_t row) const { return {first, distance, list + row}; }
};

// c = a b, or c += a b, for R rows of `depth` numbers of a and V vectors of columns of b, whose rows
// lie b_row apart. Calls beside() before every stretch of steps.
template <int R, int V, typename A, typename C, typename Beside = Nothing>
inline __attribute__((always_inline)) void Tile(A a, const float* b, int64_t b_row, int64_t depth,
                                                C c, bool add, Beside beside = {}) {
  Vector sum[R][V];
  const float* factors[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) factors[r] = a(r);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = add ? At(c(r) + v * kLanes) : Vector{};
  const auto step = [&](int64_t k) __attribute__((always_inline)) {
    Vector row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = At(b + k * b_row + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vector factor = factors[r][k] - Vector{};
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] += factor * row[v];
    }
  };
  int64_t k = 0;
  while (k < depth) {
    beside();
    const int64_t end = std::min(k + kStretch, depth);
    // Where another thread shares the core's decoders, every instruction beside the products costs.
    for (; k + 4 <= end; k += 4) {
      step(k);
      step(k + 1);
      step(k + 2);
      step(k + 3);
    }
    for (; k < end; ++k) step(k);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) At(c(r) + v * kLanes) = sum[r][v];
}

// The tiles of `rows` rows: whole ones, then what is left. Every sum is taken in the order of
// `depth`, whatever stands beside it.
template <int R, int V, typename A, typename C>
void Tiles(int64_t rows, A a, const float* b, int64_t b_row, int64_t depth, C c, bool add) {
  for (; rows >= R; rows -= R, a = a.From(R), c = c.From(R))
    Tile<R, V>(a, b, b_row, depth, c, add);
  if constexpr (R > 1)
    if (rows > 0) Tiles<R - 1, V>(rows, a, b, b_row, depth, c, add);
}

}  // namespace iro_jax

#endif
