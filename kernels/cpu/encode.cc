// Weights as codes of few bits, as an XLA custom call; see weights.h for what they are.
//
//   w [k, n], or its transpose   ->   words, lines, and by stripe whether every number is one
//
// The blocks of 32 numbers of some neighbouring columns are tried together, each with the slopes
// that the quantisers of GGUF would have chosen for it.

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "tasks.h"
#include "vectors.h"
#include "weights.h"
#include "xla/ffi/api/ffi.h"

namespace iro_jax {
namespace {

namespace ffi = xla::ffi;

inline Vector Smaller(Vector a, Vector b) { return a < b ? a : b; }
inline Vector Larger(Vector a, Vector b) { return a > b ? a : b; }

inline bool Any(const Integers& x) {
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= x[i];
  return found != 0;
}

// To the nearest integer, of two the even one; for what is far below 2^22.
inline Vector Round(Vector x) {
  const Vector magic = Vector{} + 12582912.0f;
  return (x + magic) - magic;
}

// To the nearest number of 16 bits, which slopes are in files: times a code, they are exact.
inline Vector Half(Vector x) {
  const Vector few = (x + 0.5f) - 0.5f;  // below 2^-14 they are multiples of 2^-24
  Integers bits = reinterpret_cast<const Integers&>(x);
  bits = (bits + 0xfff + ((bits >> 13) & 1)) & ~0x1fff;
  return x < 6.103515625e-5f ? few : reinterpret_cast<const Vector&>(bits);
}

inline Vector Over(Vector x, Vector slope) { return x / (slope == 0.0f ? Vector{} + 1.0f : slope); }

// One block of some columns, `column` numbers being a row's: their codes, slopes and offsets. False
// if there is a number that has no code.
template <int kBits>
bool Block(const float* column, Vector* code, Vector& slope, Vector& low) {
  constexpr int64_t kNumbers = kCodedBlock;
  const Vector codes = Vector{} + float(1 << kBits);
  low = At(column);
  Vector high = low;
  for (int64_t i = 1; i < kNumbers; ++i) {
    low = Smaller(low, At(column + i * kColumns));
    high = Larger(high, At(column + i * kColumns));
  }
  const Vector largest = Larger(high, -low), range = high - low;
  // Q4_1 and Q4_0, or Q8_0, Q5_0 and Q5_1.
  const Vector tried[] = {kBits == 4 ? range / 15.0f : largest / 127.0f,
                          kBits == 4 ? largest / 8.0f : largest / 16.0f, range / 31.0f};
  slope = Vector{};
  Integers done{};
  for (int t = 0; t < (kBits == 4 ? 2 : 3); ++t) {
    const Vector rounded = Half(tried[t]);
    Integers same = ~Integers{};
    for (int64_t i = 0; i < kNumbers; ++i) {
      const Vector x = At(column + i * kColumns), found = Round(Over(x - low, rounded));
      same &= (rounded * found + low == x) & (found < codes);
    }
    slope = same & ~done ? rounded : slope;
    done |= same;
    if (!Any(~done)) break;
  }
  for (int64_t i = 0; i < kNumbers; ++i)
    code[i] = Round(Over(At(column + i * kColumns) - low, slope));
  return !Any(~done);
}

template <bool kTransposed, int kBits>
bool Stripe(const Whole<kTransposed>& w, int64_t stripe, int32_t* words, float* lines) {
  constexpr int64_t kCodes = 32 / kBits;
  alignas(64) float panel[kCodedBlock * kColumns];
  for (int64_t from = 0; from < w.k; from += kCodedBlock) {
    for (int64_t inside = 0; inside < kCodedWidth; inside += kColumns) {
      const int64_t column = stripe * kCodedWidth + inside;
      const int64_t columns = std::clamp<int64_t>(w.n - column, 0, kColumns);
      w.Pack(from, std::min(column, w.n - 1), kCodedBlock, columns, panel);
      for (int64_t v = 0; v < kColumns; v += kLanes) {
        Vector code[kCodedBlock], slope, low;
        if (!Block<kBits>(panel + v, code, slope, low)) return false;
        float* line = lines + inside + v;
        At(line) = slope, At(line + kCodedWidth) = low;
        int32_t* word = words + inside + v;
        for (int64_t i = 0; i < kCodedBlock; i += kCodes, word += kCodedWidth) {
          Integers packed{};
          for (int64_t c = 0; c < kCodes; ++c)
            packed |= __builtin_convertvector(code[i + c], Integers) << (kBits * c);
          At(word) = packed;
        }
      }
    }
    words += kCodedBlock / kCodes * kCodedWidth;
    lines += 2 * kCodedWidth;
  }
  return true;
}

template <bool kTransposed, int kBits>
void Stripes(ffi::ThreadPool& pool, const Whole<kTransposed>& w, int32_t* words, float* lines,
             int32_t* exact) {
  const int64_t stripes = Parts(w.n, kCodedWidth);
  std::atomic<bool> failed{false};
  Run(pool, stripes, w.n * w.k, [&, words, lines, exact](int64_t stripe) {
    exact[stripe] = !failed && Stripe<kTransposed, kBits>(
                                   w, stripe, words + stripe * (w.k * kBits / 32) * kCodedWidth,
                                   lines + stripe * (w.k / kCodedBlock) * 2 * kCodedWidth);
    if (!exact[stripe]) failed = true;
  });
}

template <bool kTransposed>
ffi::Error Encode(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> w,
                  ffi::Result<ffi::BufferR3<ffi::S32>> words,
                  ffi::Result<ffi::BufferR4<ffi::F32>> lines,
                  ffi::Result<ffi::BufferR1<ffi::S32>> exact) {
  const int64_t n = w.dimensions()[!kTransposed], k = w.dimensions()[kTransposed];
  const int64_t bits = k ? 32 * words->dimensions()[1] / k : 0, stripes = Parts(n, kCodedWidth);
  if (n == 0 || k == 0 || k % kCodedBlock || (bits != 4 && bits != 8) ||
      words->element_count() * 32 != static_cast<size_t>(stripes * kCodedWidth * k * bits) ||
      lines->element_count() * kCodedBlock != static_cast<size_t>(stripes * kCodedWidth * k * 2) ||
      exact->dimensions()[0] != stripes)
    return ffi::Error::InvalidArgument("w, words, lines and exact are not those of one matrix");
  const Whole<kTransposed> whole{w.typed_data(), n, k};
  (bits == 4 ? Stripes<kTransposed, 4> : Stripes<kTransposed, 8>)(
      pool, whole, words->typed_data(), lines->typed_data(), exact->typed_data());
  return ffi::Error::Success();
}

constexpr auto EncodeOf = Encode<false>, EncodeOfTransposed = Encode<true>;

}  // namespace
}  // namespace iro_jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(IroEncode, iro_jax::EncodeOf,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Ret<xla::ffi::BufferR3<xla::ffi::S32>>()
                                  .Ret<xla::ffi::BufferR4<xla::ffi::F32>>()
                                  .Ret<xla::ffi::BufferR1<xla::ffi::S32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(IroEncodeTransposed, iro_jax::EncodeOfTransposed,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                                  .Ret<xla::ffi::BufferR3<xla::ffi::S32>>()
                                  .Ret<xla::ffi::BufferR4<xla::ffi::F32>>()
                                  .Ret<xla::ffi::BufferR1<xla::ffi::S32>>());
