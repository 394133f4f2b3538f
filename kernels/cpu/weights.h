// Where the weights of a product are read from: whole numbers, or codes of few bits.
//
// A panel is kColumns columns and `depth` rows of w[k, n] from (from, column) on.

#ifndef IRO_JAX_KERNELS_CPU_WEIGHTS_H_
#define IRO_JAX_KERNELS_CPU_WEIGHTS_H_

#include <algorithm>
#include <cstdint>

#include "vectors.h"

namespace iro_jax {

// Stored as [k, n], or as [n, k] if they are transposed.
template <bool kTransposed>
struct Whole {
  const float* w;
  int64_t n, k;

  // A panel of transposed weights is never shallow: its rows lie side by side in memory.
  static constexpr bool kMayBeShallow = !kTransposed;
  static constexpr int64_t kTogether = 1;

  // Copies a panel of which only so many columns are there; the others are zero.
  void Pack(int64_t from, int64_t column, int64_t depth, int64_t columns, float* panel) const {
    const float* corner = Corner(from, column);
    if (columns < kColumns) std::fill_n(panel, depth * kColumns, 0.0f);
    if (kTransposed) {
      Transpose(corner, k, columns, depth, panel, kColumns);
    } else if (columns < kColumns) {
      for (int64_t i = 0; i < depth; ++i)
        std::copy_n(corner + i * n, columns, panel + i * kColumns);
    } else {  // by registers: a call of memmove a row takes a tenth of all time
      for (int64_t i = 0; i < depth; ++i, corner += n, panel += kColumns)
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) At(panel + v * kLanes) = At(corner + v * kLanes);
    }
  }

  // Fetches the i-th of a panel's `depth` pieces of kColumns numbers.
  void Fetch(int64_t from, int64_t column, int64_t i) const {
    constexpr int kLine = 16;
    const float* piece = kTransposed ? Corner(from, column + i % kColumns) + i / kColumns * kColumns
                                     : Corner(from + i, column);
#pragma GCC unroll 3
    for (int64_t j = 0; j < kColumns; j += kLine) __builtin_prefetch(piece + j, 0, 2);
  }

 private:
  const float* Corner(int64_t from, int64_t column) const {
    return kTransposed ? w + column * k + from : w + from * n + column;
  }
};

// Columns of a stripe, whose codes lie in one piece, and rows whose weights for one column share a
// line.
constexpr int64_t kCodedWidth = 48, kCodedBlock = 32;
static_assert(kCodedWidth % kColumns == 0, "a panel must not be of two stripes");

// Stored as codes of kBits bits, which stand for numbers on a line: slope * code + offset. A word
// has the codes of neighbouring rows, the first in its lowest bits.
template <int kBits>
struct Coded {
  static constexpr int64_t kWidth = kCodedWidth, kBlock = kCodedBlock, kCodes = 32 / kBits;

  const int32_t* words;  // [stripes, k / kCodes, kWidth]
  const float* lines;    // [stripes, k / kBlock, 2, kWidth]: slopes, offsets
  int64_t k;

  static constexpr bool kMayBeShallow = false;
  // Panels that share cache lines.
  static constexpr int64_t kTogether = kWidth / kColumns;

  // `from` and `depth` are whole blocks; the columns behind the last one are there, too.
  void Pack(int64_t from, int64_t column, int64_t depth, int64_t, float* panel) const {
    const int64_t row = column / kWidth * k + from, inside = column % kWidth;
    const int32_t* word = words + row / kCodes * kWidth + inside;
    const float* line = lines + row / kBlock * 2 * kWidth + inside;
    for (int64_t i = 0; i < depth; i += kBlock, line += 2 * kWidth) {
      Vector slope[kVectors], offset[kVectors];
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) {
        slope[v] = At(line + v * kLanes);
        offset[v] = At(line + kWidth + v * kLanes);
      }
      for (int j = 0; j < kBlock / kCodes; ++j, word += kWidth)
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) {
          Integers codes = At(word + v * kLanes);
#pragma GCC unroll 8
          for (int c = 0; c < kCodes; ++c, codes >>= kBits)
            At(panel + (j * kCodes + c) * kColumns + v * kLanes) =
                slope[v] * __builtin_convertvector(codes & ((1 << kBits) - 1), Vector) + offset[v];
        }
      panel += kBlock * kColumns;
    }
  }

  void Fetch(int64_t from, int64_t column, int64_t i) const {
    const int64_t row = column / kWidth * k + from + i;
    __builtin_prefetch(words + row * kWidth / kCodes, 0, 2);
    __builtin_prefetch(lines + row * kWidth * 2 / kBlock, 0, 2);
  }
};

}  // namespace iro_jax

#endif
