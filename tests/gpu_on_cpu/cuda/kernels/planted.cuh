// Kernels with a bug each, on request, and without.
#pragma once

// Reverses each block's 128 numbers through static shared memory.
template <int kBug>
__global__ void reverse(const float* in, float* out) {
  __shared__ float tile[128];
  const unsigned i = threadIdx.x, n = blockDim.x;
  const unsigned first = kBug == 7 ? 0 : blockIdx.x * n;
  tile[i] = in[blockIdx.x * n + i + (kBug == 1 ? 1 : 0)];
  float* element = tile + i;
  if (kBug == 2 && i == 127) element[1] = 0;
  if (kBug != 4) {
    if (kBug != 5 || threadIdx.x < 96) __syncthreads();
  }
  out[first + i] = tile[n - 1 - i];
  if (kBug == 5) __syncthreads();
}
