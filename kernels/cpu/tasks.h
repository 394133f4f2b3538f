// Tasks for XLA's own threads.

#ifndef IRO_JAX_KERNELS_CPU_TASKS_H_
#define IRO_JAX_KERNELS_CPU_TASKS_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace iro_jax {

inline int64_t Threads(xla::ffi::ThreadPool& pool) {
  return std::max<int64_t>(pool.num_threads(), 1);
}

// Multiply-adds for which it pays to wake a thread, some ten microseconds of one.
constexpr int64_t kWorthAThread = 1 << 20;

// Threads that it pays to have for so many multiply-adds.
inline int64_t Threads(xla::ffi::ThreadPool& pool, int64_t steps) {
  return std::min(Threads(pool), 1 + steps / kWorthAThread);
}

// Calls work(0), ..., work(tasks - 1), which are `steps` multiply-adds together, and returns when
// all are done. Threads take one task after the other, so that a slow one holds nobody up; the
// caller is one of them, and the only one where there is little to do.
template <typename Work>
void Run(xla::ffi::ThreadPool& pool, int64_t tasks, int64_t steps, Work work) {
  struct Shared {
    Work work;
    int64_t tasks;
    std::atomic<int64_t> begun{0}, done{0};

    Shared(Work work, int64_t tasks) : work(std::move(work)), tasks(tasks) {}

    void Help() {
      for (int64_t task; (task = begun.fetch_add(1)) < tasks; done.fetch_add(1)) work(task);
    }
  };
  // Helpers may come when all is done and the caller has gone: the state belongs to all of them.
  auto shared = std::make_shared<Shared>(std::move(work), tasks);
  const int64_t threads = std::min(Threads(pool, steps), tasks);
  for (int64_t helper = 1; helper < threads; ++helper)
    pool.Schedule([shared] { shared->Help(); });
  shared->Help();
  while (shared->done.load() < tasks) std::this_thread::yield();
}

}  // namespace iro_jax

#endif
