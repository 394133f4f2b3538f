// The product of activations and a weight matrix on a CPU, as an XLA custom call.
//
//   y[m, n] = sum_k x[m, k] * w[k, n]        f32, row-major, m at least a few rows
//
// The columns are cut into panels. A task copies a panel of w, which is then read from a core's
// own cache for all rows of a block, and multiplies it in tiles whose sums stay in registers:
//
//              kColumns                  tasks: panels x blocks of kRowBlock rows, taken by
//          +-----+-----+---              XLA's own threads one after the other, so that a
//   kDepth |panel|     |                 slow thread holds nobody up
//          +-----+                       tile:  kRows x kColumns sums
//
// Every element is summed in the order of k whatever m is: a row's result does not depend on the
// rows beside it.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// As many sums as the vector registers hold beside a row of the panel and a factor.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 8;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRows = 4;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRows = 8;
#else
constexpr int kLanes = 4, kRows = 4;
#endif
constexpr int kVectors = 3;
constexpr int64_t kColumns = kVectors * kLanes;
constexpr int64_t kDepth = 576;
constexpr int64_t kRowBlock = 256;
// Tasks that each thread should find at least, and panels of a task at most.
constexpr int64_t kTasks = 4, kPanels = 4;

typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// Adds a tile's products with a panel to c, or stores them there.
template <int R>
inline __attribute__((always_inline)) void Tile(const float* a, int64_t a_row, const float* panel,
                                                int64_t depth, float* c, int64_t c_row, bool add) {
  Vector sum[R][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v)
      sum[r][v] = add ? *reinterpret_cast<const Vector*>(c + r * c_row + v * kLanes) : Vector{};
  for (int64_t k = 0; k < depth; ++k) {
    Vector row[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v)
      row[v] = *reinterpret_cast<const Vector*>(panel + k * kColumns + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vector factor = a[r * a_row + k] - Vector{};
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sum[r][v] += factor * row[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v)
      *reinterpret_cast<Vector*>(c + r * c_row + v * kLanes) = sum[r][v];
}

// The tiles of `rows` rows: whole ones, then what is left, R rows or fewer.
template <int R>
void Tiles(int64_t rows, const float* a, int64_t a_row, const float* panel, int64_t depth, float* c,
           int64_t c_row, bool add) {
  for (; rows >= R; rows -= R, a += R * a_row, c += R * c_row)
    Tile<R>(a, a_row, panel, depth, c, c_row, add);
  if constexpr (R > 1)
    if (rows > 0) Tiles<R - 1>(rows, a, a_row, panel, depth, c, c_row, add);
}

// Copies w's next `depth` rows of up to kColumns columns; the missing columns are zero.
void Pack(const float* w, int64_t w_row, int64_t depth, int64_t columns, float* panel) {
  if (columns == kColumns) {  // by registers: a call of memmove a row takes a tenth of all time
    for (int64_t k = 0; k < depth; ++k, w += w_row, panel += kColumns)
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v)
        *reinterpret_cast<Vector*>(panel + v * kLanes) =
            *reinterpret_cast<const Vector*>(w + v * kLanes);
    return;
  }
  for (int64_t k = 0; k < depth; ++k, w += w_row, panel += kColumns)
    std::fill(std::copy_n(w, columns, panel), panel + kColumns, 0.0f);
}

constexpr int64_t Parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

class Product {
 public:
  Product(const float* x, const float* w, float* y, int64_t m, int64_t n, int64_t k, int64_t threads)
      : x_(x), w_(w), y_(y), m_(m), n_(n), k_(k), panels_(Parts(n, kColumns)) {
    group_ = std::clamp<int64_t>(panels_ / (kTasks * threads), 1, kPanels);
    groups_ = Parts(panels_, group_);
    tasks_ = groups_ * Parts(m, kRowBlock);
  }

  int64_t tasks() const { return tasks_; }

  // Does tasks until none is left to begin.
  void Work() {
    for (int64_t task; (task = begun_.fetch_add(1)) < tasks_; done_.fetch_add(1)) {
      const int64_t first = task % groups_ * group_, last = std::min(first + group_, panels_);
      for (int64_t index = first; index < last; ++index)
        Panel(index * kColumns, task / groups_ * kRowBlock);
    }
  }

  // Until all tasks are done, those that others began included.
  void Wait() const {
    while (done_.load() < tasks_) std::this_thread::yield();
  }

 private:
  void Panel(int64_t column, int64_t top) {
    alignas(64) static thread_local float panel[kDepth * kColumns], spare[kRowBlock * kColumns];
    const int64_t rows = std::min(kRowBlock, m_ - top), columns = std::min(kColumns, n_ - column);
    float *y = y_ + top * n_ + column, *c = y;
    int64_t c_row = n_;
    if (columns < kColumns) c = spare, c_row = kColumns;  // a tile would write over the edge
    for (int64_t k = 0; k < k_; k += kDepth) {
      const int64_t depth = std::min(kDepth, k_ - k);
      Pack(w_ + k * n_ + column, n_, depth, columns, panel);
      Tiles<kRows>(rows, x_ + top * k_ + k, k_, panel, depth, c, c_row, k > 0);
    }
    if (c != y)
      for (int64_t r = 0; r < rows; ++r) std::copy_n(c + r * c_row, columns, y + r * n_);
  }

  const float *x_, *w_;
  float* y_;
  int64_t m_, n_, k_, panels_, group_, groups_, tasks_;
  std::atomic<int64_t> begun_{0}, done_{0};
};

ffi::Error Matmul(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, ffi::BufferR2<ffi::F32> w,
                  ffi::Result<ffi::BufferR2<ffi::F32>> y) {
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1], n = w.dimensions()[1];
  if (w.dimensions()[0] != k || y->dimensions()[0] != m || y->dimensions()[1] != n)
    return ffi::Error::InvalidArgument("x, w and y must be [m, k], [k, n] and [m, n]");
  if (k == 0) {
    std::fill_n(y->typed_data(), m * n, 0.0f);
    return ffi::Error::Success();
  }
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  // Helpers may come late, when all is done and this call has returned: they share the ownership.
  auto product = std::make_shared<Product>(x.typed_data(), w.typed_data(), y->typed_data(), m, n, k,
                                           threads);
  for (int64_t helper = 1; helper < std::min(threads, product->tasks()); ++helper)
    pool.Schedule([product] { product->Work(); });
  product->Work();
  product->Wait();
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(IroMatmul, Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Ret<ffi::BufferR2<ffi::F32>>());
