// Which rows of a matrix differ: successors of a beam begin alike, and so do their rows.

#ifndef IRO_JAX_KERNELS_CPU_DISTINCT_H_
#define IRO_JAX_KERNELS_CPU_DISTINCT_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace iro_jax {

// Rows that are equal to the last bit. Equal ones may be taken for different ones, which costs time
// and nothing else: they are found by a hash of a few of their numbers.
class Distinct {
 public:
  struct Copy {
    int32_t of, row;
  };

  // Of x[m, k].
  Distinct(const float* x, int64_t m, int64_t k) {
    int64_t size = 1;
    while (size < 2 * m) size *= 2;
    std::vector<Place> table(size + kProbes, Place{0, kNobody});
    rows_.reserve(m);
    for (int64_t row = 0; row < m; ++row) {
      const float* numbers = x + row * k;
      const uint32_t hash = Hash(numbers, k);
      Place* place = &table[hash & (size - 1)];
      Place* const end = place + kProbes;
      const auto equal = [&] {
        return place->hash == hash && !std::memcmp(x + place->row * k, numbers, k * sizeof(float));
      };
      while (place < end && place->row != kNobody && !equal()) ++place;
      if (place < end && place->row != kNobody) {
        copies_.push_back({place->row, static_cast<int32_t>(row)});
      } else {
        if (place < end) *place = {hash, static_cast<int32_t>(row)};
        rows_.push_back(row);
      }
    }
  }

  // The first of each kind, in order.
  const std::vector<int32_t>& rows() const { return rows_; }

  // The others, each with the first of its kind.
  const std::vector<Copy>& copies() const { return copies_; }

 private:
  // Places where a row is looked for, so that no matrix takes long; and numbers of a hash.
  static constexpr int64_t kProbes = 8, kNumbers = 8;
  static constexpr int32_t kNobody = -1;

  struct Place {
    uint32_t hash;
    int32_t row;
  };

  std::vector<int32_t> rows_;
  std::vector<Copy> copies_;

  // Of numbers from all over the row.
  static uint32_t Hash(const float* numbers, int64_t k) {
    const int64_t step = std::max<int64_t>(k / kNumbers, 1);
    uint64_t hash = 0;
    for (int64_t i = 0; i < k; i += step) {
      uint32_t bits;
      std::memcpy(&bits, numbers + i, sizeof(bits));
      hash = (hash ^ bits) * 0x9e3779b97f4a7c15;
      hash ^= hash >> 32;
    }
    return hash;
  }
};

}  // namespace iro_jax

#endif
