// Where the weights of a product are read from: whole numbers, or codes of few bits.
//
// A panel is kColumns columns and `depth` rows of w[k, n] from (from, column) on. It is made by
// Pack, or in pieces by Piece.

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
  static constexpr bool kInPieces = false;

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
  static constexpr bool kInPieces = true;
  // Panels that share cache lines.
  static constexpr int64_t kTogether = kWidth / kColumns;
  // Rows between a piece and what is fetched meanwhile.
  static constexpr int64_t kSoon = 192;

  // A piece is a vector of columns of a block. `depth` and `from` are of whole blocks; the columns
  // behind the last one are there, too.
  static constexpr int64_t Pieces(int64_t depth) { return depth / kBlock * kVectors; }

  inline __attribute__((always_inline)) void Piece(int64_t from, int64_t column, int64_t i,
                                                   float* panel) const {
    const int64_t block = i / kVectors, beside = i % kVectors * kLanes;
    const int64_t row = column / kWidth * k + from + block * kBlock;
    const int64_t lane = column % kWidth + beside;
    const int32_t* word = words + row / kCodes * kWidth + lane;
    const float* line = lines + row / kBlock * 2 * kWidth + lane;
    const Vector slope = At(line), offset = At(line + kWidth);
    for (int64_t v = 0; v < 2; ++v)
      __builtin_prefetch(line + (kSoon / kBlock * 2 + v) * kWidth, 0, 2);
    panel += block * kBlock * kColumns + beside;
    for (int j = 0; j < kBlock / kCodes; ++j, word += kWidth) {
      __builtin_prefetch(word + kSoon / kCodes * kWidth, 0, 2);
      Integers codes = At(word);
#pragma GCC unroll 8
      for (int c = 0; c < kCodes; ++c, codes >>= kBits, panel += kColumns)
        At(panel) =
            slope * __builtin_convertvector(codes & ((1 << kBits) - 1), Vector) + offset;
    }
  }

  void Pack(int64_t from, int64_t column, int64_t depth, int64_t, float* panel) const {
    for (int64_t i = 0; i < Pieces(depth); ++i) Piece(from, column, i, panel);
  }

  void Fetch(int64_t from, int64_t column, int64_t i) const {
    const int64_t row = column / kWidth * k + from + i;
    __builtin_prefetch(words + row * kWidth / kCodes, 0, 2);
    __builtin_prefetch(lines + row * kWidth * 2 / kBlock, 0, 2);
  }
};

}  // namespace iro_jax

#endif
