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
// A row's result does not depend on the rows beside it, and rows that are equal are multiplied once:
// what follows counts the distinct ones alone.

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "distinct.h"
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
// Up to kSomeRows rows memory takes much of the time, up to kFewRows most of it. The next panel is
// fetched beside the tiles then; panels are only kMiddle and kShallow deep, so that they fit into the
// nearest cache. Where that is too small for kMiddle, the next panel of codes is made there as well.
constexpr int64_t kFewRows = 32, kShallow = 48, kSomeRows = 160, kMiddle = 192;
static_assert(kDepth % kCodedBlock == 0 && kMiddle % kCodedBlock == 0, "panels of whole blocks");
// Multiply-adds that take as long as copying a number, about.
constexpr int64_t kCopying = 16;
// Tasks that each thread should find at least, and panels of a task at most.
constexpr int64_t kTasks = 4, kPanels = 4;

bool FitsIntoNearestCache(int64_t bytes) {
#ifdef _SC_LEVEL1_DCACHE_SIZE
  static const int64_t size = sysconf(_SC_LEVEL1_DCACHE_SIZE);
  return bytes <= size;
#else
  return true;
#endif
}

// What is done for the next panel beside one tile, spread over its stretches, so that there is room
// for the loads of the products.
template <typename Action>
struct Spread {
  Action action;
  int64_t next, end, stretches;
  int64_t each = end - next, due = 0;

  inline __attribute__((always_inline)) void operator()() {
    for (due += each; due >= stretches; due -= stretches) action(next++);
  }
};

template <typename Weights>
struct Product {
  const float* x;
  Weights w;
  float* y;
  int64_t n, k;
  const Distinct* distinct;
  int64_t m = distinct->rows().size();

  struct Panel {
    int64_t from, column, depth;
  };

  // The panels from `first` to `last` for a block of rows from `top` on. `after` is the one that is
  // likely to come next.
  void Panels(int64_t first, int64_t last, int64_t after, int64_t top) const {
    const bool few = Weights::kMayBeShallow && m <= kFewRows, some = m <= kSomeRows;
    const bool fits = FitsIntoNearestCache(kMiddle * kColumns * sizeof(float));
    const int64_t step = few ? kShallow : some && fits ? kMiddle : kDepth;
    const auto at = [&](int64_t from, int64_t panel) {
      return Panel{from, panel * kColumns, std::min(step, k - from)};
    };
    float *now = made[0], *then = made[1];
    bool ready = false;
    for (int64_t panel = first; panel < last; ++panel)
      for (int64_t from = 0; from < k; from += step) {
        const Panel here = at(from, panel);
        const bool below = from + step < k, beside = panel + 1 < last;
        const Panel next = below ? at(from + step, panel) : at(0, beside ? panel + 1 : after);
        if (!ready) w.Pack(here.from, here.column, here.depth, Columns(here), now);
        ready = false;
        if constexpr (Weights::kInPieces) ready = some && !fits && (below || beside);
        if (!ready) {
          Multiply(here, top, now, some ? here.depth : 0, [next, w = w](int64_t i) {
            w.Fetch(next.from, next.column, i);
          });
        } else if constexpr (Weights::kInPieces) {
          Multiply(here, top, now, Weights::Pieces(next.depth), [next, then, w = w](int64_t i) {
            w.Piece(next.from, next.column, i, then);
          });
          std::swap(now, then);
        }
      }
  }

 private:
  alignas(64) static inline thread_local float made[2][kDepth * kColumns];
  alignas(64) static inline thread_local float spare[kRowBlock * kColumns];

  int64_t Columns(const Panel& panel) const { return std::min(kColumns, n - panel.column); }

  // One panel's products, and so many actions beside them.
  template <typename Action>
  void Multiply(const Panel& here, int64_t top, const float* panel, int64_t actions,
                Action action) const {
    const int64_t rows = std::min(kRowBlock, m - top);
    const int32_t* list = distinct->rows().data() + top;
    const Listed<const float> a{x + here.from, k, list};
    const Listed<float> c{y + here.column, n, list};
    const int64_t columns = Columns(here);
    if (columns == kColumns) return Multiply(here, rows, a, panel, c, actions, action);
    // A tile would write over the edge.
    Multiply(here, rows, a, panel, Every<float>{spare, kColumns}, actions, action);
    if (here.from + here.depth == k)
      for (int64_t i = 0; i < rows; ++i) std::copy_n(spare + i * kColumns, columns, c(i));
  }

  template <typename A, typename C, typename Action>
  static void Multiply(const Panel& here, int64_t rows, A a, const float* panel, C c,
                       int64_t actions, Action action) {
    const bool add = here.from > 0;
    int64_t row = 0;
    if (actions > 0) {
      const int64_t tiles = rows / kRows, stretches = Parts(here.depth, kStretch);
      for (int64_t tile = 0; tile < tiles; ++tile, row += kRows)
        Tile<kRows, kVectors>(a.From(row), panel, kColumns, here.depth, c.From(row), add,
                              Spread<Action>{action, tile * actions / tiles,
                                             (tile + 1) * actions / tiles, stretches});
      if (tiles == 0)
        for (int64_t i = 0; i < actions; ++i) action(i);
    }
    Tiles<kRows, kVectors>(rows - row, a.From(row), panel, kColumns, here.depth, c.From(row), add);
  }
};

template <typename Weights>
ffi::Error Multiply(ffi::ThreadPool& pool, const float* x, const Weights& w, float* y, int64_t m,
                    int64_t n, int64_t k) {
  if (k == 0) {
    std::fill_n(y, m * n, 0.0f);
    return ffi::Error::Success();
  }
  const Distinct distinct(x, m, k);
  const Product<Weights> product{x, w, y, n, k, &distinct};
  const int64_t panels = Parts(n, kColumns), threads = Threads(pool);
  const int64_t fit = std::clamp<int64_t>(panels / (kTasks * threads), 1, kPanels);
  const int64_t group = Parts(fit, Weights::kTogether) * Weights::kTogether;
  const int64_t groups = Parts(panels, group);
  Run(pool, groups * Parts(product.m, kRowBlock), product.m * n * k, [=](int64_t task) {
    const int64_t first = task % groups * group, after = (task + threads) % groups * group;
    product.Panels(first, std::min(first + group, panels), after, task / groups * kRowBlock);
  });
  const auto& copies = distinct.copies();
  const int64_t number = copies.size();
  Run(pool, number, number * n * kCopying, [=, copy = copies.data()](int64_t i) {
    std::copy_n(y + copy[i].of * n, n, y + copy[i].row * n);
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
