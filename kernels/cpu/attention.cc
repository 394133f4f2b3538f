// Attention over keys that lie in several parts on a CPU, as an XLA custom call.
//
// T tokens, each with `heads` x `group` queries, attend to parts one after the other, which a
// running softmax joins (Milakov & Gimelshein 2018; Dao et al. 2022). A part has a number of
// places of equal size: place i holds the keys of tokens [i T / places, (i + 1) T / places).
//
//   task: one head of a block of tokens    Q  [tokens * group, size]    copied once
//   for each part, place, and kKeys keys:
//     S = Q K',  P = exp(S - max),  O = O exp(old max - max) + P V
//
// Keys are copied, transposed, for a product by tiles; those of the last part are read where they
// lie if every token has a place of its own there, and so no more than `group` queries. But for that,
// a token's result does not depend on the tokens beside it.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "tasks.h"
#include "tiles.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace iro_jax {
namespace {

namespace ffi = xla::ffi;

// Queries of one task, about, and tasks that each thread should find at least.
constexpr int64_t kQueries = 96, kTasks = 3;
// Keys that are attended to at once, and those of a tile.
constexpr int64_t kKeys = 64, kTileKeys = kWide * kLanes;
// Queries of one place that are few enough to read keys once for each.
constexpr int64_t kFewQueries = 8;
static_assert(kKeys % kTileKeys == 0, "scores of whole tiles");
// Less than any score, and finite, so that nothing seen gives exp(0) * 0.
using In = Every<const float>;
using Out = Every<float>;

constexpr float kHidden = -1e30f;

struct Part {
  const float *keys, *values;  // [places, heads, slots, size]
  const uint8_t* visible;      // [T, slots]
  int64_t places, slots, used;
};

struct Attention {
  const float* queries;  // [T, heads, group, size]
  float* out;
  int64_t tokens, heads, group, size;
  std::vector<Part> parts;

  // Room that a thread needs for one task.
  struct Scratch {
    std::vector<float> queries, sums, keys, values, scores, maximum, total;
  };

  // Numbers of a row of O: whole vectors.
  int64_t Width() const { return Parts(size, kLanes) * kLanes; }

  void Block(int64_t first, int64_t last, int64_t head) const {
    static thread_local Scratch s;
    const int64_t rows = (last - first) * group, width = Width();
    s.queries.resize(rows * size);
    s.sums.assign(rows * width, 0.0f);
    s.keys.resize(size * kTileKeys);
    s.values.resize(kKeys * width);
    s.scores.resize(rows * kKeys);
    s.maximum.assign(rows, kHidden);
    s.total.assign(rows, 0.0f);
    for (int64_t t = first; t < last; ++t)
      std::copy_n(queries + (t * heads + head) * group * size, group * size,
                  s.queries.data() + (t - first) * group * size);
    for (const Part& part : parts) {
      const int64_t each = tokens / part.places;
      for (int64_t t = first, end; t < last; t = end) {
        end = std::min(last, (t / each + 1) * each);
        for (int64_t slot = 0; slot < part.used; slot += kKeys)
          Attend(part, (t / each * heads + head) * part.slots + slot, slot, t, end, first, s);
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      const float scale = 1.0f / std::max(s.total[row], 1e-37f);
      float* to = out + ((first + row / group) * heads + head) * group * size + row % group * size;
      for (int64_t d = 0; d < size; ++d) to[d] = s.sums[row * width + d] * scale;
    }
  }

  // From tokens [t, end) to the slots of one place from `slot` on, whose keys begin at row `place`.
  void Attend(const Part& part, int64_t place, int64_t slot, int64_t t, int64_t end, int64_t first,
              Scratch& s) const {
    const int64_t width = Width(), next = heads * part.slots;
    const uint8_t* seen = part.visible + t * part.slots + slot;
    // Slots at the end that no token sees are left out: a chunk fills up as it is written.
    const int64_t count = Shown(seen, part.slots, end - t, std::min(kKeys, part.used - slot));
    if (count == 0) return;

    const float* keys = part.keys + place * size;
    const float* values = part.values + place * size;
    const int64_t ahead = place + next < part.places * next ? next * size : 0;
    const bool few = &part == &parts.back() && part.places == tokens && group <= kFewQueries &&
                     width == size;
    if (!few) {
      Fetch(values, count * size);
      Fetch(keys + ahead, count * size);
    }
    if (width != size) {
      for (int64_t j = 0; j < count; ++j)
        std::fill(std::copy_n(values + j * size, size, s.values.data() + j * width),
                  s.values.data() + (j + 1) * width, 0.0f);
      values = s.values.data();
    }

    const int64_t row = (t - first) * group, rows = (end - t) * group;
    const float* q = s.queries.data() + row * size;
    float* scores = s.scores.data() + row * kKeys;
    float* sums = s.sums.data() + row * width;
    if (few)
      FewScores(rows, q, keys, values, ahead, count, scores);
    else
      Scores(rows, q, keys, count, s.keys.data(), scores);
    const int vectors = Parts(count, kLanes);
    for (int64_t i = 0; i < end - t; ++i) {
      uint8_t bytes[kKeys] = {};
      std::copy_n(seen + i * part.slots, count, bytes);
      Integers mask[kKeys / kLanes];
      for (int v = 0; v < vectors; ++v)
        mask[v] = __builtin_convertvector(*reinterpret_cast<const Bytes*>(bytes + v * kLanes),
                                          Integers) != 0;
      for (int64_t r = i * group; r < (i + 1) * group; ++r)
        Weigh(scores + r * kKeys, vectors, mask, sums + r * width, s.maximum[row + r],
              s.total[row + r]);
    }
    const In weights{scores, kKeys};
    int64_t d = 0;
    for (; d + kWide * kLanes <= width; d += kWide * kLanes)
      Tiles<kWideRows, kWide>(rows, weights, values + d, width, count, Out{sums + d, width}, true);
    for (; d < width; d += kLanes)
      Tiles<kRows, 1>(rows, weights, values + d, width, count, Out{sums + d, width}, true);
  }

  // How many of `count` slots are left without those at the end that none of the tokens sees.
  static int64_t Shown(const uint8_t* seen, int64_t slots, int64_t tokens, int64_t count) {
    int64_t shown = 0;
    for (int64_t i = 0; i < tokens && shown < count; ++i)
      for (int64_t j = count; j > shown; --j)
        if (seen[i * slots + j - 1]) shown = j;
    return shown;
  }

  // Into the cache behind the nearest: places are too short for processors to see them coming.
  static void Fetch(const float* x, int64_t count) {
    for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(x + i, 0, 2);
  }

  // S = Q K' with a copy of transposed keys, for which there is `room`.
  void Scores(int64_t rows, const float* q, const float* keys, int64_t count, float* room,
              float* scores) const {
    for (int64_t j = 0; j < count; j += kTileKeys) {
      const int64_t some = std::min(kTileKeys, count - j);
      Transpose(keys + j * size, size, some, size, room, kTileKeys);
      const int vectors = Parts(some, kLanes);
      const auto tiles = vectors == 1   ? Tiles<kRows, 1, In, Out>
                         : vectors == 2 ? Tiles<kRows, 2, In, Out>
                         : vectors == 3 ? Tiles<kRows, kVectors, In, Out>
                                        : Tiles<kWideRows, kWide, In, Out>;
      tiles(rows, In{q, size}, room, kTileKeys, size, Out{scores + j, kKeys}, false);
    }
  }

  // The same from keys as they are, whose size is of whole vectors. What lies `ahead` of keys and
  // values is fetched beside it, all at once would be more than a core can wait for.
  void FewScores(int64_t rows, const float* q, const float* keys, const float* values,
                 int64_t ahead, int64_t count, float* scores) const {
    for (int64_t r = 0; r < rows; ++r, q += size, scores += kKeys)
      for (int64_t j = 0; j < count; j += kLanes) {
        const int64_t some = std::min<int64_t>(kLanes, count - j);
        if (r == 0) Fetch(keys + ahead + j * size, some * size);
        if (r == rows - 1) Fetch(values + ahead + j * size, some * size);
        At(scores + j) = some == kLanes ? Dots<true>(q, keys + j * size, size, some)
                                        : Dots<false>(q, keys + j * size, size, some);
      }
  }

  // Scores become weights relative to the largest so far; what was summed up follows it.
  void Weigh(float* scores, int vectors, const Integers* mask, float* sums, float& maximum,
             float& total) const {
    Vector most = Vector{} + maximum;
    for (int v = 0; v < vectors; ++v) {
      const Vector x = mask[v] ? At(scores + v * kLanes) : Vector{} + kHidden;
      most = x > most ? x : most;
    }
    const float largest = Largest(most);
    if (largest > maximum) {
      const Vector change = Exp(Vector{} + (maximum - largest));
      for (int64_t d = 0; d < Width(); d += kLanes) At(sums + d) *= change;
      total *= change[0];
      maximum = largest;
    }
    Vector weights{};
    for (int v = 0; v < vectors; ++v) {
      const Vector weight = mask[v] ? Exp(At(scores + v * kLanes) - largest) : Vector{};
      At(scores + v * kLanes) = weight;
      weights += weight;
    }
    total += Sum(weights);
  }
};

// After the queries: keys, values, what is visible, and how many slots are used, of each part.
// Sizes come as attributes and not from shapes, so that axes of size one need not be there: XLA
// could not update a cache in place that is read through a reshape.
ffi::Error Attend(ffi::ThreadPool pool, ffi::AnyBuffer queries, ffi::RemainingArgs rest,
                  ffi::Span<const int64_t> shape, ffi::Span<const int64_t> slots,
                  ffi::Result<ffi::AnyBuffer> out) {
  if (shape.size() != 3 || shape[0] < 1 || shape[1] < 1 || shape[2] < 1 ||
      queries.element_type() != ffi::F32 || out->element_type() != ffi::F32 ||
      out->element_count() != queries.element_count() || rest.size() != 4 * slots.size())
    return ffi::Error::InvalidArgument("the queries do not fit what was announced");
  const int64_t heads = shape[0], group = shape[1], size = shape[2];
  const int64_t tokens = queries.element_count() / (heads * group * size);
  auto attention = std::make_shared<Attention>();
  *attention = {queries.typed_data<float>(), out->typed_data<float>(), tokens, heads, group, size,
                {}};
  for (size_t i = 0; i < slots.size(); ++i) {
    auto keys = rest.get<ffi::AnyBuffer>(4 * i), values = rest.get<ffi::AnyBuffer>(4 * i + 1);
    auto visible = rest.get<ffi::AnyBuffer>(4 * i + 2), used = rest.get<ffi::AnyBuffer>(4 * i + 3);
    if (!keys || !values || !visible || !used || keys->element_type() != ffi::F32 ||
        values->element_type() != ffi::F32 || visible->element_type() != ffi::PRED ||
        used->element_type() != ffi::S32 || used->element_count() != 1)
      return ffi::Error::InvalidArgument("a part must be f32, f32, bool and int32");
    const int64_t held = keys->element_count(), place = heads * slots[i] * size;
    const int64_t places = place > 0 ? held / place : 0;
    if (places < 1 || held != places * place || tokens % places ||
        static_cast<int64_t>(values->element_count()) != held ||
        static_cast<int64_t>(visible->element_count()) != tokens * slots[i])
      return ffi::Error::InvalidArgument("a part's shape does not fit the queries'");
    attention->parts.push_back(
        {keys->typed_data<float>(), values->typed_data<float>(),
         reinterpret_cast<const uint8_t*>(visible->typed_data<bool>()), places, slots[i],
         std::clamp<int64_t>(*used->typed_data<int32_t>(), 0, slots[i])});
  }
  int64_t seen = 0;
  for (const Part& part : attention->parts) seen += part.used;
  const int64_t steps = 2 * heads * group * tokens * seen * size;
  const int64_t blocks = Parts(kTasks * Threads(pool, steps), heads);
  const int64_t block =
      std::max<int64_t>(std::min(kQueries / group, Parts(tokens, blocks)), 1);
  Run(pool, heads * Parts(tokens, block), steps, [=](int64_t task) {
    const int64_t first = task / heads * block;
    attention->Block(first, std::min(first + block, tokens), task % heads);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace iro_jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(IroAttend, iro_jax::Attend,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Attr<xla::ffi::Span<const int64_t>>("shape")
                                  .Attr<xla::ffi::Span<const int64_t>>("slots")
                                  .Ret<xla::ffi::AnyBuffer>());
