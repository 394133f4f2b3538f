// The product of activations and a weight matrix on a CPU, as an XLA custom call.
//
//   y[m, n] = sum_k x[m, k] * w[k, n]        f32, row-major, m at least a few rows
//
// or of w stored as its transpose, [n, k]. The columns are cut into panels. A task copies a panel of w, which is then read from a core's
// own cache for all rows of a block, and multiplies it in tiles:
//
//              kColumns
//          +-----+-----+---
//   kDepth |panel|     |            tasks: groups of panels x blocks of kRowBlock rows
//          +-----+
//
// A row's result does not depend on the rows beside it.

#include <algorithm>
#include <cstdint>

#include "tasks.h"
#include "tiles.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace iro_jax {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kDepth = 576;
constexpr int64_t kRowBlock = 256;
// Up to kSomeRows rows memory takes much of the time, up to kFewRows most of it. Panels are only
// kMiddle and kShallow deep then: they lie in the nearest cache while the next one is fetched.
// A panel of transposed weights is never shallow: its rows lie side by side in memory.
constexpr int64_t kFewRows = 32, kShallow = 48, kSomeRows = 160, kMiddle = 192;
// Tasks that each thread should find at least, and panels of a task at most.
constexpr int64_t kTasks = 4, kPanels = 4;

// The weights as they are stored: [k, n], or [n, k] if they are transposed.
template <bool kTransposed>
struct Weights {
  const float* w;
  int64_t n, k;

  const float* Corner(int64_t from, int64_t column) const {
    return kTransposed ? w + column * k + from : w + from * n + column;
  }

  // Copies `depth` rows of up to kColumns columns; the missing columns are zero.
  void Pack(const float* corner, int64_t depth, int64_t columns, float* panel) const {
    if (columns < kColumns) std::fill_n(panel, depth * kColumns, 0.0f);
    if (kTransposed) {
      Transpose(corner, k, columns, depth, panel, kColumns);
    } else if (columns < kColumns) {
      for (int64_t i = 0; i < depth; ++i) std::copy_n(corner + i * n, columns, panel + i * kColumns);
    } else {  // by registers: a call of memmove a row takes a tenth of all time
      for (int64_t i = 0; i < depth; ++i, corner += n, panel += kColumns)
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) At(panel + v * kLanes) = At(corner + v * kLanes);
    }
  }

  // The i-th of a panel's `depth` pieces of kColumns numbers.
  const float* Piece(const float* corner, int64_t i) const {
    return kTransposed ? corner + i % kColumns * k + i / kColumns * kColumns : corner + i * n;
  }
};

// Fetches every `every`th piece of a panel into the cache that lies behind the nearest. Spread over
// the tiles, it leaves room for the loads of the products.
template <bool kTransposed>
struct Fetch {
  Weights<kTransposed> weights;
  const float* corner;
  int64_t piece;
  int every, left;

  void operator()(int64_t) {
    if (--left > 0) return;
    left = every;
    constexpr int kLine = 16;
    const float* numbers = weights.Piece(corner, piece);
#pragma GCC unroll 3
    for (int64_t i = 0; i < kColumns; i += kLine) __builtin_prefetch(numbers + i, 0, 2);
    piece += every;
  }
};

template <bool kTransposed>
struct Product {
  const float* x;
  Weights<kTransposed> w;
  float* y;
  int64_t m;

  // `after` is the column of the panel that is likely to come next.
  void Panel(int64_t column, int64_t top, int64_t after) const {
    alignas(64) static thread_local float panel[kDepth * kColumns], spare[kRowBlock * kColumns];
    const int64_t n = w.n, k = w.k;
    const int64_t rows = std::min(kRowBlock, m - top), columns = std::min(kColumns, n - column);
    float *out = y + top * n + column, *c = out;
    int64_t c_row = n;
    if (columns < kColumns) c = spare, c_row = kColumns;  // a tile would write over the edge
    const int64_t step = m > kSomeRows                ? kDepth
                         : kTransposed || m > kFewRows ? kMiddle
                                                       : kShallow;
    for (int64_t from = 0; from < k; from += step) {
      const int64_t depth = std::min(step, k - from);
      const float *a = x + top * k + from, *b = w.Corner(from, column);
      w.Pack(b, depth, columns, panel);
      int64_t row = 0;
      if (m <= kSomeRows) {
        const int tiles = rows / kRows;
        const float* next = from + step < k ? w.Corner(from + step, column) : w.Corner(0, after);
        for (int tile = 0; tile < tiles; ++tile, row += kRows)
          Tile<kRows, kVectors>(a + row * k, k, panel, kColumns, depth, c + row * c_row, c_row,
                                from > 0, Fetch<kTransposed>{w, next, tile, tiles, tile + 1});
      }
      Tiles<kRows, kVectors>(rows - row, a + row * k, k, panel, kColumns, depth, c + row * c_row,
                             c_row, from > 0);
    }
    if (c != out)
      for (int64_t r = 0; r < rows; ++r) std::copy_n(c + r * c_row, columns, out + r * n);
  }
};

template <bool kTransposed>
ffi::Error Matmul(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, ffi::BufferR2<ffi::F32> w,
                  ffi::Result<ffi::BufferR2<ffi::F32>> y) {
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1], n = w.dimensions()[!kTransposed];
  if (w.dimensions()[kTransposed] != k || y->dimensions()[0] != m || y->dimensions()[1] != n)
    return ffi::Error::InvalidArgument("x, w and y must be [m, k], [k, n] and [m, n]");
  if (k == 0) {
    std::fill_n(y->typed_data(), m * n, 0.0f);
    return ffi::Error::Success();
  }
  const Product<kTransposed> product{x.typed_data(), {w.typed_data(), n, k}, y->typed_data(), m};
  const int64_t panels = Parts(n, kColumns), threads = Threads(pool);
  const int64_t group = std::clamp<int64_t>(panels / (kTasks * threads), 1, kPanels);
  const int64_t groups = Parts(panels, group);
  Run(pool, groups * Parts(m, kRowBlock), m * n * k, [=](int64_t task) {
    const int64_t first = task % groups * group, last = std::min(first + group, panels);
    const int64_t next_first = (task + threads) % groups * group;
    for (int64_t panel = first; panel < last; ++panel)
      product.Panel(panel * kColumns, task / groups * kRowBlock,
                    (panel + 1 < last ? panel + 1 : next_first) * kColumns);
  });
  return ffi::Error::Success();
}

constexpr auto MatmulOf = Matmul<false>, MatmulOfTransposed = Matmul<true>;

}  // namespace
}  // namespace iro_jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(IroMatmul, iro_jax::MatmulOf,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Ret<xla::ffi::BufferR2<xla::ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(IroMatmulTransposed, iro_jax::MatmulOfTransposed,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Ret<xla::ffi::BufferR2<xla::ffi::F32>>());
