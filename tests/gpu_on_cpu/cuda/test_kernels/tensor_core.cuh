// c = a b of one 16 x 8 tile by one warp; fragments loaded by ldmatrix or as the PTX ISA says.
#pragma once

enum class Loads { ldmatrix, by_hand };

// a [16, 16] and b [16, 8] of 16-bit numbers.
template <Loads kLoads, void (*kMultiply)(float (&)[4], const unsigned (&)[4],
                                          const unsigned (&)[2], emulator::Site)>
__global__ void multiply_16(const unsigned short* a, const unsigned short* b, float* c) {
  __shared__ __align__(16) unsigned short tile_a[16][16], tile_b[16][8];
  const int lane = threadIdx.x, row = lane / 4, column = lane % 4;
  for (int i = lane; i < 256; i += 32) tile_a[i / 16][i % 16] = a[i];
  for (int i = lane; i < 128; i += 32) tile_b[i / 8][i % 8] = b[i];
  __syncwarp();
  unsigned fragment_a[4], fragment_b[2];
  if (kLoads == Loads::ldmatrix) {
    ptx::ldmatrix(fragment_a, &tile_a[lane % 16][lane / 16 * 8]);
    ptx::ldmatrix_trans(fragment_b, &tile_b[lane % 16][0]);
  } else {
    const auto pair = [](unsigned low, unsigned high) { return low | high << 16; };
    for (int r = 0; r < 4; r++) {
      const int i = row + r % 2 * 8, k = 2 * column + r / 2 * 8;
      fragment_a[r] = pair(tile_a[i][k], tile_a[i][k + 1]);
    }
    for (int r = 0; r < 2; r++) {
      const int k = 2 * column + r * 8;
      fragment_b[r] = pair(tile_b[k][row], tile_b[k + 1][row]);
    }
  }
  float sum[4] = {};
  kMultiply(sum, fragment_a, fragment_b, {});
  for (int r = 0; r < 4; r++) c[(row + r / 2 * 8) * 8 + 2 * column + r % 2] = sum[r];
}

// a [16, 8] and b [8, 8] of fp32, rounded to tf32.
__global__ void multiply_tf32(const float* a, const float* b, float* c) {
  const int lane = threadIdx.x, row = lane / 4, column = lane % 4;
  unsigned fragment_a[4], fragment_b[2];
  for (int r = 0; r < 4; r++)
    fragment_a[r] = ptx::to_tf32(a[(row + r % 2 * 8) * 8 + column + r / 2 * 4]);
  for (int r = 0; r < 2; r++) fragment_b[r] = ptx::to_tf32(b[(column + r * 4) * 8 + row]);
  float sum[4] = {};
  ptx::mma_m16n8k8_tf32(sum, fragment_a, fragment_b);
  for (int r = 0; r < 4; r++) c[(row + r / 2 * 8) * 8 + 2 * column + r % 2] = sum[r];
}

// What each of 32 lanes gets of 1, 2 or 4 matrices [8, 8], stored one after another.
template <int kMatrices, bool kTransposed>
__global__ void load_matrices(const unsigned short* matrices, unsigned* registers) {
  __shared__ __align__(16) unsigned short rows[kMatrices * 8][8];
  const int lane = threadIdx.x;
  for (int i = lane; i < kMatrices * 64; i += 32) rows[i / 8][i % 8] = matrices[i];
  __syncwarp();
  unsigned r[kMatrices];
  const void* row = lane < 8 * kMatrices ? rows[lane] : nullptr;  // others are not looked at
  if (kTransposed)
    ptx::ldmatrix_trans(r, row);
  else
    ptx::ldmatrix(r, row);
  for (int m = 0; m < kMatrices; m++) registers[m * 32 + lane] = r[m];
}

// Copies of 4, 8 and 16 bytes, of which `count` bytes are read.
template <int kBytes>
__global__ void copy_part(const unsigned char* in, int count, unsigned char* out) {
  __shared__ __align__(16) unsigned char tile[kBytes];
  ptx::cp_async<kBytes>(tile, in, count);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  for (int i = 0; i < kBytes; i++) out[i] = tile[i];
}

// Two groups in flight: out has what has landed after all but the newest had to.
__global__ void wait_for_older(const float* in, float* out) {
  __shared__ float tile[2];
  for (int i = 0; i < 2; i++) {
    ptx::cp_async<4>(&tile[i], in + i);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<1>();
  out[0] = tile[0];
  ptx::cp_async_wait<0>();
  out[1] = tile[1];
}
