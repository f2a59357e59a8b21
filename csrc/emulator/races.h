// SPDX-License-Identifier: Apache-2.0
// The emulator's calls to the watcher of the kernels: the race detector (races.cpp), the counter (counts.cpp) or gcc's
// libtsan (libtsan.cpp). Builds with VITKERN_WATCHED link one of them; in other builds these calls do nothing.
//
// In such a build the kernels are compiled with -fsanitize=thread, by which the compiler calls a function before
// each access to memory; races.cpp and counts.cpp have these functions, in place of libtsan.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include "emulator/cuda_types.h"

namespace emulator {

constexpr int kWarpLanes = 32;

// The line of a kernel that calls.
struct Site {
  const char* file = "";
  int line = 0;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator!=(const Site& other) const {
    return line != other.line || std::strcmp(file, other.file) != 0;
  }
};

namespace races {

enum class Access { kRead, kWrite, kUpdate };  // an update is atomic

// A thread is ordered after all accesses of its block before barrier `epoch`, and after each lane of its warp up to a
// number, which the lane itself raises where others can tell before from after. races.cpp has the argument.
struct Clock {
  uint32_t block = 0, epoch = 0;
  int thread = 0;
  std::array<uint32_t, kWarpLanes> lanes{};
};

#ifdef VITKERN_WATCHED
std::mutex& one_launch();  // at a time
std::vector<int64_t> order_of_blocks(int64_t count);
void launch_begins(const char* kernel, const void* function, int64_t blocks);
std::string launch_ends();  // the races found, or nothing
void block_begins(uint3 index, int threads, const void* dynamic_shared, size_t bytes);
void names_dynamic_shared(const char* name);
// A thread goes on, on a stack of its own; none does.
void thread_runs(int thread, const void* stack, size_t bytes);
void scheduler_runs();
// All threads of the block have come to a barrier; the lanes of `mask` have.
void block_barrier(const Site& site);
void warp_barrier(const Site& site, int first_thread, unsigned mask);
// The lanes of `mask` have come to an operation of their warp, of any kind.
void warp_meets(int first_thread, unsigned mask);
// An access of the running thread that the compiler does not see.
void sees(Access access, const void* address, size_t bytes, const void* caller);
// ldmatrix is about to read 16 bytes that the running thread names; each number it hands out is seen besides.
void sees_row(const void* row, const void* caller);
void fills(size_t bytes);  // cudaMemsetAsync
// An asynchronous copy of the running thread, which begins at `before`; `from` may be null.
Clock copy_begins(const void* to, const void* from, const void* caller);
void copy_arrives(const Clock& before, const void* to, const void* from, size_t bytes, const void* caller);

// While one lives, accesses are those of a kernel, or of the emulator.
class Recording {
 public:
  explicit Recording(bool kernel_runs);
  ~Recording();

 private:
  bool before_;
};

#define VITKERN_CALLED inline __attribute__((noinline))  // a function that asks who called it
#define VITKERN_CALLER __builtin_return_address(0)
#define VITKERN_UNSEEN __attribute__((no_sanitize("thread")))
#else
inline void launch_begins(const char*, const void*, int64_t) {}
inline std::string launch_ends() { return {}; }
inline void block_begins(uint3, int, const void*, size_t) {}
inline void names_dynamic_shared(const char*) {}
inline void thread_runs(int, const void*, size_t) {}
inline void scheduler_runs() {}
inline void block_barrier(const Site&) {}
inline void warp_barrier(const Site&, int, unsigned) {}
inline void warp_meets(int, unsigned) {}
inline void sees(Access, const void*, size_t, const void*) {}
inline void sees_row(const void*, const void*) {}
inline void fills(size_t) {}
inline Clock copy_begins(const void*, const void*, const void*) { return {}; }
inline void copy_arrives(const Clock&, const void*, const void*, size_t, const void*) {}

struct Recording {
  explicit Recording(bool) {}
  ~Recording() {}
};

#define VITKERN_CALLED inline
#define VITKERN_CALLER nullptr
#define VITKERN_UNSEEN
#endif

}  // namespace races
}  // namespace emulator
