// The k largest numbers of each scaled row and where they are, as an XLA custom call.
//
//   values[m, i] = x[m, ids[m, i]] * scale        f32, falling
//
// NaN comes before all numbers, 0 is equal to -0, and what comes first is before its equals. The k
// largest are no less than the k-th largest of the blocks' maxima, so that only blocks which reach
// it are looked at number by number.

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "tasks.h"
#include "tiles.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace iro_jax {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kBlock = 64;

typedef int32_t Bits __attribute__((may_alias));

// An order of all f32 by integers.
template <typename Integer, typename Float>
Integer Order(Float x) {
  x = x + 0.0f;  // no -0
  const Integer bits = reinterpret_cast<const Integer&>(x);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

struct Entry {
  int32_t order, id;

  bool operator<(const Entry& other) const {  // comes before
    return order != other.order ? order > other.order : id < other.id;
  }
};

int32_t LargestOrder(const float* x, int64_t count, float scale) {
  int32_t largest = INT32_MIN;
  if (count == kBlock) {
    Integers most = Order<Integers>(At(x) * scale);
#pragma GCC unroll 16
    for (int64_t i = kLanes; i < kBlock; i += kLanes) {
      const Integers next = Order<Integers>(At(x + i) * scale);
      most = next > most ? next : most;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) largest = std::max(largest, most[i]);
    return largest;
  }
  for (int64_t i = 0; i < count; ++i)
    largest = std::max(largest, Order<Bits>(x[i] * scale));
  return largest;
}

struct Scratch {
  std::vector<Entry> kept;
  std::vector<int32_t> largest, sorted;  // of each block
};

void TopK(const float* x, int64_t n, int64_t k, float scale, Scratch& s, float* values,
          int32_t* ids) {
  const int64_t blocks = Parts(n, kBlock);
  s.largest.resize(blocks);
  for (int64_t block = 0; block < blocks; ++block)
    s.largest[block] = LargestOrder(x + block * kBlock, std::min(kBlock, n - block * kBlock), scale);
  int32_t enough = INT32_MIN;  // what one of the k largest is at least
  if (k < blocks) {
    s.sorted = s.largest;
    std::nth_element(s.sorted.begin(), s.sorted.begin() + (k - 1), s.sorted.end(),
                     std::greater<int32_t>());
    enough = s.sorted[k - 1];
  }
  s.kept.clear();  // becomes a heap, with what would have to leave on top
  for (int64_t block = 0; block < blocks; ++block) {
    if (s.largest[block] < enough) continue;
    const int64_t end = std::min(n, (block + 1) * kBlock);
    for (int64_t i = block * kBlock; i < end; ++i) {
      const Entry entry{Order<Bits>(x[i] * scale), static_cast<int32_t>(i)};
      if (entry.order < enough) continue;
      if (static_cast<int64_t>(s.kept.size()) == k) {
        if (!(entry < s.kept[0])) continue;
        std::pop_heap(s.kept.begin(), s.kept.end());
        s.kept.pop_back();
      }
      s.kept.push_back(entry);
      std::push_heap(s.kept.begin(), s.kept.end());
    }
  }
  std::sort_heap(s.kept.begin(), s.kept.end());
  for (int64_t i = 0; i < k; ++i) values[i] = x[s.kept[i].id] * scale, ids[i] = s.kept[i].id;
}

ffi::Error TopKs(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x,
                 ffi::Result<ffi::BufferR2<ffi::F32>> values,
                 ffi::Result<ffi::BufferR2<ffi::S32>> ids, float scale) {
  const int64_t rows = x.dimensions()[0], n = x.dimensions()[1], k = values->dimensions()[1];
  if (values->dimensions()[0] != rows || ids->dimensions()[0] != rows ||
      ids->dimensions()[1] != k || k < 1 || k > n)
    return ffi::Error::InvalidArgument("values and ids must have 1 to n entries for each row");
  const float* from = x.typed_data();
  float* found = values->typed_data();
  int32_t* places = ids->typed_data();
  Run(pool, rows, rows * n, [=](int64_t row) {
    static thread_local Scratch scratch;
    TopK(from + row * n, n, k, scale, scratch, found + row * k, places + row * k);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace iro_jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(IroTopK, iro_jax::TopKs,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Ret<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Ret<xla::ffi::BufferR2<xla::ffi::S32>>()
                                  .Attr<float>("scale"));
