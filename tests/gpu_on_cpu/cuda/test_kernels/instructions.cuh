// One instruction per lane.
#pragma once

// results [11, 32], of a warp's x.
__global__ void warp_functions(const int* x, int* results) {
  const int lane = threadIdx.x, value = x[lane];
  int n = 0;
  const auto store = [&](int result) { results[32 * n++ + lane] = result; };
  store(__shfl_sync(~0u, value, 5));
  store(__shfl_sync(~0u, value, lane + 1, 8));
  store(__shfl_up_sync(~0u, value, 3));
  store(__shfl_up_sync(~0u, value, 3, 8));
  store(__shfl_down_sync(~0u, value, 3));
  store(__shfl_down_sync(~0u, value, 3, 8));
  store(__shfl_xor_sync(~0u, value, 9));
  store(static_cast<int>(__ballot_sync(~0u, value % 3 == 0)));
  store(__any_sync(~0u, value == x[7]));
  store(__all_sync(~0u, value == x[7]));
  // Halves that vote apart.
  store(static_cast<int>(__ballot_sync(lane < 16 ? 0xffffu : 0xffff0000u, value % 3 == 0)));
}

__global__ void atomics(const int* x, int* results) {
  const int value = x[(blockIdx.x * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x];
  atomicAdd(&results[0], value);
  atomicMax(&results[1], value);
  atomicMin(&results[2], value);
  atomicInc(reinterpret_cast<unsigned*>(&results[3]), 4u);
  int seen = atomicOr(&results[4], 0), expected;
  do {
    expected = seen;
    seen = atomicCAS(&results[4], expected, expected ^ value);
  } while (seen != expected);
}

// Roundings of x to 16 bits, to tf32 and back.
__global__ void conversions(const float* x, int n, unsigned short* bf16, unsigned short* f16,
                            unsigned* tf32, float* back) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  bf16[i] = static_cast<unsigned short>(ptx::pack_bf16(x[i], 0.f));
  f16[i] = static_cast<unsigned short>(ptx::pack_f16(0.f, x[i]) >> 16);
  tf32[i] = ptx::to_tf32(x[i]);
  back[i] = ptx::from_f16(f16[i]);
}

// Of pairs of bf16: results [2, n], the smaller and the larger.
__global__ void extremes(const unsigned* a, const unsigned* b, int n, unsigned* results) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  results[i] = ptx::min_bf16x2(a[i], b[i]);
  results[n + i] = ptx::max_bf16x2(a[i], b[i]);
}
