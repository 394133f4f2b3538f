// The product of activations and a weight matrix on a CPU, as an XLA custom call.
//
//   y[m, n] = sum_k x[m, k] * w[k, n]        f32, row-major, best of a few rows at least
//
// or of w stored as its transpose, or as codes of few bits. The columns are cut into panels. A task
// copies a panel of w, which is then read from a core's own cache for all rows of a block, and
// multiplies it in tiles:
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
#include "weights.h"
#include "xla/ffi/api/ffi.h"

namespace iro_jax {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kDepth = 576;
constexpr int64_t kRowBlock = 256;
// Up to kSomeRows rows memory takes much of the time, up to kFewRows most of it. Panels are only
// kMiddle and kShallow deep then: they lie in the nearest cache while the next one is fetched.
constexpr int64_t kFewRows = 32, kShallow = 48, kSomeRows = 160, kMiddle = 192;
static_assert(kDepth % kCodedBlock == 0 && kMiddle % kCodedBlock == 0, "panels of whole blocks");
// Tasks that each thread should find at least, and panels of a task at most.
constexpr int64_t kTasks = 4, kPanels = 4;

// Fetches every `every`th piece of the panel at (from, column) into the cache that lies behind the
// nearest. Spread over the tiles, it leaves room for the loads of the products.
template <typename Weights>
struct Fetch {
  Weights weights;
  int64_t from, column, piece;
  int every, left;

  void operator()(int64_t) {
    if (--left > 0) return;
    left = every;
    weights.Fetch(from, column, piece);
    piece += every;
  }
};

template <typename Weights>
struct Product {
  const float* x;
  Weights w;
  float* y;
  int64_t m, n, k;

  // `after` is the column of the panel that is likely to come next.
  void Panel(int64_t column, int64_t top, int64_t after) const {
    alignas(64) static thread_local float panel[kDepth * kColumns], spare[kRowBlock * kColumns];
    const int64_t rows = std::min(kRowBlock, m - top), columns = std::min(kColumns, n - column);
    float *out = y + top * n + column, *c = out;
    int64_t c_row = n;
    if (columns < kColumns) c = spare, c_row = kColumns;  // a tile would write over the edge
    const bool shallow = Weights::kMayBeShallow && m <= kFewRows;
    const int64_t step = m > kSomeRows ? kDepth : shallow ? kShallow : kMiddle;
    for (int64_t from = 0; from < k; from += step) {
      const int64_t depth = std::min(step, k - from);
      const float* a = x + top * k + from;
      w.Pack(from, column, depth, columns, panel);
      int64_t row = 0;
      if (m <= kSomeRows) {
        const int tiles = rows / kRows;
        const bool below = from + step < k;
        const int64_t next = below ? from + step : 0, beside = below ? column : after;
        for (int tile = 0; tile < tiles; ++tile, row += kRows)
          Tile<kRows, kVectors>(a + row * k, k, panel, kColumns, depth, c + row * c_row, c_row,
                                from > 0, Fetch<Weights>{w, next, beside, tile, tiles, tile + 1});
      }
      Tiles<kRows, kVectors>(rows - row, a + row * k, k, panel, kColumns, depth, c + row * c_row,
                             c_row, from > 0);
    }
    if (c != out)
      for (int64_t r = 0; r < rows; ++r) std::copy_n(c + r * c_row, columns, out + r * n);
  }
};

template <typename Weights>
ffi::Error Multiply(ffi::ThreadPool& pool, const float* x, const Weights& w, float* y, int64_t m,
                    int64_t n, int64_t k) {
  if (k == 0) {
    std::fill_n(y, m * n, 0.0f);
    return ffi::Error::Success();
  }
  const Product<Weights> product{x, w, y, m, n, k};
  const int64_t panels = Parts(n, kColumns), threads = Threads(pool);
  const int64_t fit = std::clamp<int64_t>(panels / (kTasks * threads), 1, kPanels);
  const int64_t group = Parts(fit, Weights::kTogether) * Weights::kTogether;
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

template <bool kTransposed>
ffi::Error Matmul(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, ffi::BufferR2<ffi::F32> w,
                  ffi::Result<ffi::BufferR2<ffi::F32>> y) {
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1], n = w.dimensions()[!kTransposed];
  if (w.dimensions()[kTransposed] != k || y->dimensions()[0] != m || y->dimensions()[1] != n)
    return ffi::Error::InvalidArgument("x, w and y must be [m, k], [k, n] and [m, n]");
  const Whole<kTransposed> weights{w.typed_data(), n, k};
  return Multiply(pool, x.typed_data(), weights, y->typed_data(), m, n, k);
}

ffi::Error MatmulCoded(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x,
                       ffi::BufferR3<ffi::S32> words, ffi::BufferR4<ffi::F32> lines,
                       ffi::Result<ffi::BufferR2<ffi::F32>> y) {
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1], n = y->dimensions()[1];
  const auto codes = words.dimensions(), blocks = lines.dimensions();
  const int64_t stripes = Parts(n, kCodedWidth), bits = 32 * codes[1] / std::max<int64_t>(k, 1);
  if (y->dimensions()[0] != m || codes[0] != stripes || codes[2] != kCodedWidth ||
      blocks[0] != stripes || blocks[1] * kCodedBlock != k || blocks[2] != 2 ||
      blocks[3] != kCodedWidth || (bits != 4 && bits != 8) || 32 * codes[1] != bits * k)
    return ffi::Error::InvalidArgument("x, words, lines and y are not those of one product");
  const auto multiply = [&](auto w) {
    return Multiply(pool, x.typed_data(), w, y->typed_data(), m, n, k);
  };
  return bits == 4 ? multiply(Coded<4>{words.typed_data(), lines.typed_data(), k})
                   : multiply(Coded<8>{words.typed_data(), lines.typed_data(), k});
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
XLA_FFI_DEFINE_HANDLER_SYMBOL(IroMatmulCoded, iro_jax::MatmulCoded,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Arg<xla::ffi::BufferR3<xla::ffi::S32>>()
                                  .Arg<xla::ffi::BufferR4<xla::ffi::F32>>()
                                  .Ret<xla::ffi::BufferR2<xla::ffi::F32>>());
