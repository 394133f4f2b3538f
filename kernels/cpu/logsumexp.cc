// The logarithm of a sum of exponentials over each row, as an XLA custom call.
//
//   y[m] = max_n x[m, n] + log(sum_n exp(x[m, n] - max_n x[m, n]))        f32
//
// A row is read twice, the second time from a core's own cache.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "tasks.h"
#include "tiles.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace iro_jax {
namespace {

namespace ffi = xla::ffi;

// Vectors that are summed beside each other, and added up at the end.
constexpr int kBeside = 4;
constexpr int64_t kStep = kBeside * kLanes;
// What an exponential takes, in multiply-adds.
constexpr int64_t kExpSteps = 16;

float LogSumExp(const float* x, int64_t n) {
  const int64_t whole = n / kStep * kStep;
  float largest = -std::numeric_limits<float>::infinity();
  if (whole > 0) {
    Vector most[kBeside];
    for (int b = 0; b < kBeside; ++b) most[b] = At(x + b * kLanes);
    for (int64_t i = kStep; i < whole; i += kStep)
#pragma GCC unroll 4
      for (int b = 0; b < kBeside; ++b) {
        const Vector& next = At(x + i + b * kLanes);
        most[b] = next > most[b] ? next : most[b];
      }
    for (int b = 0; b < kBeside; ++b) largest = std::max(largest, Largest(most[b]));
  }
  for (int64_t i = whole; i < n; ++i) largest = std::max(largest, x[i]);
  if (!std::isfinite(largest)) return largest;
  Vector sums[kBeside] = {};
  for (int64_t i = 0; i < whole; i += kStep)
#pragma GCC unroll 4
    for (int b = 0; b < kBeside; ++b) sums[b] += Exp(At(x + i + b * kLanes) - largest);
  float sum = Sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (int64_t i = whole; i < n; ++i) sum += std::exp(x[i] - largest);
  return largest + std::log(sum);
}

ffi::Error LogSumExps(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x,
                      ffi::Result<ffi::BufferR1<ffi::F32>> y) {
  const int64_t rows = x.dimensions()[0], n = x.dimensions()[1];
  if (y->dimensions()[0] != rows) return ffi::Error::InvalidArgument("y must have a number a row");
  const float* from = x.typed_data();
  float* to = y->typed_data();
  Run(pool, rows, kExpSteps * rows * n,
      [=](int64_t row) { to[row] = LogSumExp(from + row * n, n); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace iro_jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(IroLogSumExp, iro_jax::LogSumExps,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Ret<xla::ffi::BufferR1<xla::ffi::F32>>());
