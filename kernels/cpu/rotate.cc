// Queries, keys and values of one projection, rotated by their positions, as an XLA custom call.
//
//   x [rows, heads, group + 2, size]  ->  queries [rows, heads, group, size], times `scale`
//                                         keys, values [rows / length, heads, length, size]
//
// Channel i < half turns with channel i + half by the angle whose cosine and sine the row brings;
// channels from 2 half on, and values, are copied.

#include <algorithm>
#include <cstdint>

#include "tasks.h"
#include "tiles.h"
#include "xla/ffi/api/ffi.h"

namespace iro_jax {
namespace {

namespace ffi = xla::ffi;

// Rows of a task at least.
constexpr int64_t kFewest = 16;
// What a channel takes, in multiply-adds: it comes from memory and goes there.
constexpr int64_t kSteps = 16;

// Products are rounded before they are added up, as XLA rounds them.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

inline void Rotate(const float* __restrict from, const float* __restrict cosines,
                   const float* __restrict sines, int64_t half, int64_t size, float scale,
                   float* __restrict to) {
  for (int64_t i = 0; i < half; ++i) {
    const float first = from[i], second = from[i + half];
    to[i] = (first * cosines[i] - second * sines[i]) * scale;
    to[i + half] = (second * cosines[i] + first * sines[i]) * scale;
  }
  for (int64_t i = 2 * half; i < size; ++i) to[i] = from[i] * scale;
}

ffi::Error RotateHeads(ffi::ThreadPool pool, ffi::BufferR4<ffi::F32> x,
                       ffi::BufferR2<ffi::F32> cosines, ffi::BufferR2<ffi::F32> sines, float scale,
                       ffi::Result<ffi::BufferR4<ffi::F32>> queries,
                       ffi::Result<ffi::BufferR4<ffi::F32>> keys,
                       ffi::Result<ffi::BufferR4<ffi::F32>> values) {
  const int64_t rows = x.dimensions()[0], heads = x.dimensions()[1], size = x.dimensions()[3];
  const int64_t group = x.dimensions()[2] - 2, half = cosines.dimensions()[1];
  const int64_t length = keys->dimensions()[2];
  if (group < 1 || 2 * half > size || length < 1 || rows % length ||
      cosines.dimensions()[0] != rows || sines.element_count() != cosines.element_count() ||
      static_cast<int64_t>(queries->element_count()) != rows * heads * group * size ||
      static_cast<int64_t>(keys->element_count()) != rows * heads * size ||
      values->element_count() != keys->element_count())
    return ffi::Error::InvalidArgument("queries, keys and values do not fit their projection");
  const float *from = x.typed_data(), *cosine = cosines.typed_data(), *sine = sines.typed_data();
  float *q = queries->typed_data(), *k = keys->typed_data(), *v = values->typed_data();
  const int64_t block = std::max(Parts(rows, 4 * Threads(pool)), kFewest);
  Run(pool, Parts(rows, block), kSteps * x.element_count(), [=](int64_t task) {
    for (int64_t row = task * block; row < std::min(rows, (task + 1) * block); ++row)
      for (int64_t head = 0; head < heads; ++head) {
        const float *c = cosine + row * half, *s = sine + row * half;
        const float* place = from + (row * heads + head) * (group + 2) * size;
        for (int64_t g = 0; g < group; ++g)
          Rotate(place + g * size, c, s, half, size, scale,
                 q + ((row * heads + head) * group + g) * size);
        const int64_t slot = ((row / length * heads + head) * length + row % length) * size;
        Rotate(place + group * size, c, s, half, size, 1.0f, k + slot);
        std::copy_n(place + (group + 1) * size, size, v + slot);
      }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace iro_jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(IroRotateHeads, iro_jax::RotateHeads,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::BufferR4<xla::ffi::F32>>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Ret<xla::ffi::BufferR4<xla::ffi::F32>>()
                                  .Ret<xla::ffi::BufferR4<xla::ffi::F32>>()
                                  .Ret<xla::ffi::BufferR4<xla::ffi::F32>>());
