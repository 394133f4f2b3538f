// What is done to whole vectors and to their lanes.

#ifndef IRO_JAX_KERNELS_CPU_VECTORS_H_
#define IRO_JAX_KERNELS_CPU_VECTORS_H_

#include <algorithm>
#include <cstdint>
#include <utility>

#include "tiles.h"

namespace iro_jax {

typedef int32_t Integers __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(kLanes), aligned(1), may_alias));

// Numbers of a cache line.
constexpr int64_t kLine = 16;

inline const Integers& At(const int32_t* x) { return *reinterpret_cast<const Integers*>(x); }
inline Integers& At(int32_t* x) { return *reinterpret_cast<Integers*>(x); }

// exp(x) for x <= 0, to a unit in the last place or two: 2^n times a polynomial on [-ln2/2, ln2/2].
inline Vector Exp(Vector x) {
  x = x < -87.0f ? Vector{} - 87.0f : x;
  const Vector magic = Vector{} + 12582912.0f;  // rounds what is added to it
  const Vector n = (x * 1.44269504f + magic) - magic;
  const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector p = Vector{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
  return p * reinterpret_cast<const Vector&>(power);
}

typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));

// Four neighbouring lanes.
inline Quad Lanes(const Vector& x, int first) {
  return *reinterpret_cast<const Quad*>(reinterpret_cast<const float*>(&x) + first);
}

inline float Largest(const Vector& x) {
  Quad found = Lanes(x, 0);
  for (int i = 4; i < kLanes; i += 4) found = Lanes(x, i) > found ? Lanes(x, i) : found;
  return std::max(std::max(found[0], found[1]), std::max(found[2], found[3]));
}

inline float Sum(const Vector& x) {
  Quad found = Lanes(x, 0);
  for (int i = 4; i < kLanes; i += 4) found += Lanes(x, i);
  return (found[0] + found[1]) + (found[2] + found[3]);
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define IRO_JAX_SHUFFLES 1

// The lanes of a and b in turn, from lane `First` on.
template <int First, int... I>
inline Vector InTurn(Vector a, Vector b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (First + I / 2 + I % 2 * kLanes)...);
}

// A square of kLanes rows and columns, transposed; of its rows, the first `rows` are there, or all.
template <bool kAll>
inline void TransposeSquare(const float* from, int64_t from_row, int64_t rows, float* to,
                            int64_t to_row) {
  constexpr std::make_integer_sequence<int, kLanes> lanes;
  Vector row[kLanes], next[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    row[i] = Vector{};
    if (kAll || i < rows) row[i] = At(from + i * from_row);
  }
#pragma GCC unroll 4
  for (int done = 1; done < kLanes; done *= 2) {  // every time, one bit of a row's number moves
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = InTurn<0>(row[i], row[i + kLanes / 2], lanes);
      next[2 * i + 1] = InTurn<kLanes / 2>(row[i], row[i + kLanes / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) row[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) At(to + i * to_row) = row[i];
}
#endif
#endif

// The sums of kLanes vectors, each in a lane of its own. Overwrites them.
inline Vector SumEach(Vector* x) {
#ifdef IRO_JAX_SHUFFLES
  constexpr std::make_integer_sequence<int, kLanes> lanes;
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i)
      x[i] = InTurn<0>(x[i], x[i + half], lanes) +
             InTurn<kLanes / 2>(x[i], x[i + half], lanes);
  return x[0];
#else
  Vector sums;
  for (int i = 0; i < kLanes; ++i) sums[i] = Sum(x[i]);
  return sums;
#endif
}

// Adds products of V neighbouring vectors of one query with those of each of kLanes keys.
template <bool kAll, int V>
inline __attribute__((always_inline)) void AddProducts(const float* query, const float* keys,
                                                       int64_t size, int64_t count,
                                                       Vector* sums) {
  Vector factor[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) factor[v] = At(query + v * kLanes);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i, keys += size)
    if (kAll || i < count)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[i] += factor[v] * At(keys + v * kLanes);
}

// One query's products with kLanes keys, of which the first `count` are there, or all. The others'
// are zero. `size` is of whole vectors.
template <bool kAll>
inline Vector Dots(const float* query, const float* keys, int64_t size, int64_t count) {
  Vector sums[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) sums[i] = Vector{};
  int64_t d = 0;
  for (; d + kWide * kLanes <= size; d += kWide * kLanes)
    AddProducts<kAll, kWide>(query + d, keys + d, size, count, sums);
  for (; d < size; d += kLanes) AddProducts<kAll, 1>(query + d, keys + d, size, count, sums);
  return SumEach(sums);
}

// to[c, r] = from[r, c], where rows of `to` are whole vectors: what is missing at their ends is
// zero. The numbers after `_row` are the distances between rows.
inline void Transpose(const float* from, int64_t from_row, int64_t rows, int64_t columns,
                      float* to, int64_t to_row) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    const int64_t there = std::min<int64_t>(kLanes, rows - r);
    int64_t c = 0;
#ifdef IRO_JAX_SHUFFLES
    for (; c + kLanes <= columns; c += kLanes) {
      const float* square = from + r * from_row + c;
      float* turned = to + c * to_row + r;
      if (there == kLanes)
        TransposeSquare<true>(square, from_row, there, turned, to_row);
      else
        TransposeSquare<false>(square, from_row, there, turned, to_row);
    }
#endif
    for (; c < columns; ++c) {
      for (int64_t i = 0; i < there; ++i) to[c * to_row + r + i] = from[(r + i) * from_row + c];
      std::fill(to + c * to_row + r + there, to + c * to_row + r + kLanes, 0.0f);
    }
  }
}

}  // namespace iro_jax

#endif
