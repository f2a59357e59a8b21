// SPDX-License-Identifier: Apache-2.0
#include "common/parallel.h"

#include <atomic>

#if defined(_OPENMP)
#include <omp.h>
#else
#include <system_error>
#include <thread>
#include <vector>
#endif

namespace vitkern {

int worker_count(int64_t tasks, int threads) {
  if (threads < 1 || tasks < 1) return 1;
  return tasks < threads ? static_cast<int>(tasks) : threads;
}

void run_tasks(int64_t tasks, int threads, TaskFunction function, void* context) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int worker) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
      function(context, task, worker);
  };
  const int workers = worker_count(tasks, threads);
  if (workers == 1) return work(0);
#if defined(_OPENMP)
#pragma omp parallel num_threads(workers)
  work(omp_get_thread_num());
#else
  std::vector<std::thread> others;
  others.reserve(workers - 1);
  try {
    for (int worker = 1; worker < workers; ++worker) others.emplace_back(work, worker);
  } catch (const std::system_error&) {
    // The system has no more threads: those that there are do all the tasks.
  }
  work(0);
  for (std::thread& other : others) other.join();
#endif
}

}  // namespace vitkern
