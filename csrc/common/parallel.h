// SPDX-License-Identifier: Apache-2.0
// parallel_for over numbered tasks: OpenMP where the compiler has it (the pool that torch uses), threads
// otherwise.
//
// Workers pull the next task from a shared counter, so neighbouring tasks run at the same time and share
// caches. The code is compiled once, without instruction set flags: kernels pass a plain function pointer.
#pragma once

#include <cstdint>

namespace vitkern {

using TaskFunction = void (*)(void* context, int64_t task, int worker);

// How many workers run_tasks() uses; `worker` is below it.
int worker_count(int64_t tasks, int threads);

// Calls function(context, task, worker) once for each task in [0, tasks). The function must not throw.
void run_tasks(int64_t tasks, int threads, TaskFunction function, void* context);

}  // namespace vitkern

#if defined(VITKERN_ISA)
namespace vitkern::VITKERN_ISA {
namespace {

// The same for any callable (task, worker); it must not throw.
template <typename Task>
void parallel_for(int64_t tasks, int threads, Task body) {
  auto function = [](void* context, int64_t task, int worker) {
    (*static_cast<Task*>(context))(task, worker);
  };
  run_tasks(tasks, threads, function, &body);
}

}  // namespace
}  // namespace vitkern::VITKERN_ISA
#endif
