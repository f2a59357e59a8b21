// SPDX-License-Identifier: Apache-2.0
// Picks and starts the CUDA kernels of ms_deform_attn.
#include "ms_deform_attn/cuda.h"

#include "ms_deform_attn/backward.cuh"
#include "ms_deform_attn/deterministic.cuh"
#include "ms_deform_attn/forward.cuh"

namespace vitkern {
namespace {

constexpr int64_t kMax31Bits = 0x7fffffff;

// What the kernels' 32-bit arithmetic and the grid rely on.
void check_sizes(const MsDeformAttnParams& p) {
  const auto need = [](bool holds, const char* what) {
    if (!holds) throw std::runtime_error(std::string("vitkern: ms_deform_attn on CUDA: ") + what);
  };
  need(p.pixels <= kMax31Bits, "value has more than 2^31 - 1 pixels an image");
  need(p.points <= kMax31Bits, "more than 2^31 - 1 points a query and head");
  need(p.heads * p.channels <= kMax31Bits / 8, "a pixel of value has more than 2^28 - 1 channels");
  need(p.queries * p.heads <= kMax31Bits, "more than 2^31 - 1 pairs of query and head an image");
  need(p.pixels * p.heads <= kMax31Bits, "more than 2^31 - 1 pairs of pixel and head an image");
}

template <typename T>
struct Type {
  using type = T;
};

template <typename Call>
void dispatch_dtype(DType dtype, const Call& call) {
  switch (dtype) {
    case DType::kFloat32: return call(Type<float>{});
    case DType::kFloat64: return call(Type<double>{});
    case DType::kFloat16: return call(Type<__half>{});
    case DType::kBFloat16: return call(Type<__nv_bfloat16>{});
  }
  throw std::invalid_argument("vitkern: unknown dtype");
}

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % kVectorBytes == 0; }

// Calls with the value's type and, where whole vectors can be loaded, the number of channels; else with 0 for it.
template <typename Call>
void dispatch(const MsDeformAttnParams& p, const Call& call) {
  const bool vectors = aligned(p.value) && aligned(p.output) && aligned(p.grad_output) && aligned(p.grad_value);
  dispatch_dtype(p.value_dtype, [&](auto type) {
    switch (vectors ? p.channels : 0) {
      case 16: return call(type, std::integral_constant<int, 16>{});
      case 32: return call(type, std::integral_constant<int, 32>{});
      case 64: return call(type, std::integral_constant<int, 64>{});
      default: return call(type, std::integral_constant<int, 0>{});
    }
  });
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

dim3 grid_of(int64_t blocks) {
  if (blocks > kMax31Bits) throw std::runtime_error("vitkern: ms_deform_attn on CUDA: more than 2^31 - 1 blocks");
  return dim3(static_cast<unsigned>(blocks));
}

// A team for each (image, row, head), team_place() of device.cuh.
template <typename Split>
dim3 team_grid(const MsDeformAttnParams& p, int64_t rows) {
  return grid_of(p.batch * ceil_div(rows * p.heads, Split::kPerBlock));
}

void zero(void* address, int64_t elements, DType dtype, void* stream) {
  const int64_t bytes = dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
  if (address && elements)
    check_cuda(cudaMemsetAsync(address, 0, elements * bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
}

}  // namespace

void ms_deform_attn_forward_cuda(const MsDeformAttnParams& p) {
  const int64_t teams = p.batch * p.queries * p.heads;
  if (teams * p.channels == 0) return;
  const DeviceGuard guard(p.device);
  if (p.pixels == 0 || p.points == 0) return zero(p.output, teams * p.channels, p.value_dtype, p.stream);
  check_sizes(p);
  dispatch(p, [&](auto type, auto channels) {
    using T = typename decltype(type)::type;
    constexpr int kChannels = decltype(channels)::value;
    launch("ms_deform_attn_forward", ms_deform_attn_forward<T, kChannels>,
           team_grid<Team<T, kChannels>>(p, p.queries), dim3(kThreads), 0, p.stream, p);
  });
}

void ms_deform_attn_backward_cuda(const MsDeformAttnParams& p) {
  const int64_t points = p.batch * p.queries * p.heads * p.points;
  if (points == 0) return;
  const DeviceGuard guard(p.device);
  if (p.pixels == 0 || p.channels == 0) {
    zero(p.grad_locations, 2 * points, p.coord_dtype, p.stream);
    return zero(p.grad_weights, points, p.coord_dtype, p.stream);
  }
  check_sizes(p);
  dispatch(p, [&](auto type, auto channels) {
    using T = typename decltype(type)::type;
    constexpr int kChannels = decltype(channels)::value;
    launch("ms_deform_attn_backward", ms_deform_attn_backward<T, kChannels>,
           team_grid<Team<T, kChannels>>(p, p.queries), dim3(kThreads), 0, p.stream, p);
  });
}

void ms_deform_attn_cells_cuda(const MsDeformAttnParams& p, int64_t* cells) {
  const int64_t points = p.batch * p.queries * p.heads * p.points;
  if (points == 0) return;
  const DeviceGuard guard(p.device);
  check_sizes(p);
  dispatch_dtype(p.value_dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch("ms_deform_attn_cells", ms_deform_attn_cells<T>, grid_of(ceil_div(points, kThreads)), dim3(kThreads), 0,
           p.stream, p, cells);
  });
}

void ms_deform_attn_gather_grad_value_cuda(const MsDeformAttnParams& p, const int64_t* order, const int64_t* first) {
  if (p.batch * p.pixels * p.heads * p.channels == 0) return;
  const DeviceGuard guard(p.device);
  check_sizes(p);
  dispatch(p, [&](auto type, auto channels) {
    using T = typename decltype(type)::type;
    constexpr int kChannels = decltype(channels)::value;
    launch("ms_deform_attn_gather_grad_value", ms_deform_attn_gather_grad_value<T, kChannels>,
           team_grid<Team<T, kChannels>>(p, p.pixels), dim3(kThreads), 0, p.stream, p, order, first);
  });
}

}  // namespace vitkern
