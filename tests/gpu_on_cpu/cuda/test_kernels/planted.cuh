// Right kernels, and the same with a bug each.
#pragma once

enum class Bug {
  none,
  global_read,
  global_write,
  static_shared,
  dynamic_shared,
  local_array,
  misaligned_load,
  misaligned_store,
  misaligned_row,
  row_elsewhere,
  no_barrier,
  divergent_barrier,
  late_barrier,
  half_warp,
  lane_outside,
  no_warp_barrier,
  no_wait,
  copy_out_of_shared,
  early_copy,
  two_copies,
  same_output,
  no_release,
  no_acquire,
};

constexpr int kThreads = 64;

// out = a block's numbers, reversed, plus the sum of the other warp's.
template <Bug kBug>
__global__ void reverse(const float* in, float* out) {
  float* tile = ptx::dynamic_shared<float>();  // [kThreads]
  __shared__ float sums[2];
  const int i = threadIdx.x, lane = i % 32, warp = i / 32, first = blockIdx.x * kThreads;
  const bool last = i == kThreads - 1;

  ptx::cp_async<4>(tile + i + (kBug == Bug::copy_out_of_shared), in + first + i);
  if (kBug == Bug::two_copies) ptx::cp_async<4>(tile + i, in + first + i);
  ptx::cp_async_commit();
  if (kBug != Bug::no_wait) ptx::cp_async_wait<0>();
  if (kBug == Bug::dynamic_shared && last) tile[i + 1] = 0;
  if (kBug != Bug::no_barrier && kBug != Bug::late_barrier &&
      (kBug != Bug::divergent_barrier || warp == 0))
    __syncthreads();
  const float x = tile[kThreads - 1 - i];
  if (kBug == Bug::late_barrier) __syncthreads();

  float sum = x;
  if (kBug != Bug::half_warp || lane < 16) {
    const unsigned mask = kBug == Bug::lane_outside ? 0xffffu : ~0u;
    for (int bit = 16; bit > 0; bit /= 2) sum += __shfl_xor_sync(mask, sum, bit);
  }
  float* own = sums + warp;
  if (lane == 0) own[kBug == Bug::static_shared ? 1 : 0] = sum;
  if (kBug == Bug::early_copy && warp == 0) {  // others may still read the tile
    ptx::cp_async<4>(tile + i, in + first + i);
    ptx::cp_async_wait<0>();
  }
  __syncthreads();

  float result[1] = {x + sums[1 - warp]};
  const int end = blockIdx.x == gridDim.x - 1 && last;
  if (kBug == Bug::global_read && end) result[0] = in[first + i + 1];
  if (kBug == Bug::local_array) result[warp] = 0;
  out[(kBug == Bug::same_output ? 0 : first) + i + (kBug == Bug::global_write && end)] = result[0];
}

// out = in, four at a time.
template <Bug kBug>
__global__ void copy_vectors(const float* in, float* out) {
  const int i = 4 * threadIdx.x;
  const float4 x = __ldcs(reinterpret_cast<const float4*>(in + i + (kBug == Bug::misaligned_load)));
  *reinterpret_cast<float4*>(out + i + (kBug == Bug::misaligned_store)) = x;
}

// out = what lanes get of a matrix [8, 8] of 16-bit numbers.
template <Bug kBug>
__global__ void load_matrix(const float* in, float* out) {
  __shared__ float4 rows[9];
  if (threadIdx.x < 9) rows[threadIdx.x] = reinterpret_cast<const float4*>(in)[threadIdx.x];
  __syncwarp();
  const char* row = reinterpret_cast<const char*>(rows + threadIdx.x % 8);
  if (kBug == Bug::misaligned_row) row += 8;
  if (kBug == Bug::row_elsewhere) row = reinterpret_cast<const char*>(in + 4 * (threadIdx.x % 8));
  unsigned registers[1];
  ptx::ldmatrix(registers, row);
  out[threadIdx.x] = __uint_as_float(registers[0]);
}

// out = a warp's numbers, reversed through shared memory.
template <Bug kBug>
__global__ void reverse_warp(const float* in, float* out) {
  __shared__ float tile[32];
  tile[threadIdx.x] = in[threadIdx.x];
  if (kBug != Bug::no_warp_barrier) __syncwarp();
  out[threadIdx.x] = tile[31 - threadIdx.x];
}

// *out = the sum of one number per block: the last to arrive adds up what all have left. Partial
// sums lie 8 bytes apart, because the thread sanitizer keeps only few accesses for each 8 bytes.
template <Bug kBug>
__global__ void add_blocks(const float* in, float* partial, unsigned* arrived, float* out) {
  partial[2 * blockIdx.x] = in[blockIdx.x];
  if (kBug != Bug::no_release) __threadfence();
  const bool last = atomicInc(arrived, gridDim.x - 1) == gridDim.x - 1;
  if (kBug != Bug::no_acquire) __threadfence();
  if (!last) return;
  float sum = 0;
  for (unsigned b = 0; b < gridDim.x; b++) sum += partial[2 * b];
  *out = sum;
}

// The same with an atomic that orders.
__global__ void add_blocks_acq_rel(const float* in, float* partial, unsigned* arrived, float* out) {
  partial[2 * blockIdx.x] = in[blockIdx.x];
  if (ptx::atomic_add_acq_rel(arrived, 1) != gridDim.x - 1) return;
  float sum = 0;
  for (unsigned b = 0; b < gridDim.x; b++) sum += partial[2 * b];
  *out = sum;
}
