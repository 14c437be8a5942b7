// feature_map (SPEC 1): y = phi(x), [B, H, T, D] to [B, H, T, F].
//
// A block takes kStrip tokens of a head, kRows at a time; after the first ones the head's weight
// comes from the L1. 2 D f FLOPs and (D + F) numbers a token: in fp32, on the ordinary units, which
// are the limit, not memory.
#pragma once
#include "features.cuh"

namespace lol {
namespace cuda {

// Four blocks share a multiprocessor; else ptxas spills to fit six.
template <class T, bool kWide>
__global__ void __launch_bounds__(kFeatureMapThreads, 4)
    feature_map(const __grid_constant__ FeatureMapParams p) {
  constexpr int per = kPerChunk<T>;
  unsigned char* shared = ptx::dynamic_shared<unsigned char>();
  float* x = reinterpret_cast<float*>(shared + p.shared.x);
  float* phi = reinterpret_cast<float*>(shared + p.shared.phi);
  const FeatureBuffers buffers = {reinterpret_cast<float4*>(shared + p.shared.partial), x,
                                  reinterpret_cast<float*>(shared + p.shared.z)};
  const int strips = (p.T + kStrip - 1) / kStrip;
  const int head = blockIdx.x / strips % p.H, batch = blockIdx.x / strips / p.H;
  const int first = blockIdx.x % strips * kStrip;
  const int end = first + kStrip < p.T ? first + kStrip : p.T;
  const int r = threadIdx.x / 32, lane = threadIdx.x % 32;  // a warp takes a row
  for (int token = first; token < end; token += kRows) {
    const int rows = end - token < kRows ? end - token : kRows;
    if (r < rows) {
      const T* row = row_of<T>(p.x, batch, head, token + r);
      for (int c = lane * per; c < p.map.ld; c += 32 * per) {
        Chunk<T> chunk = {};
        if (c < p.map.D) chunk = load_chunk<T, kWide>(row, c, p.map.D);
        store_floats(x + r * p.map.ld + c, chunk);
      }
    }
    __syncthreads();
    const auto map_of = [&](int) { return head / p.maps.group; };
    const int thread = ptx::thread_of_block();
    project<kFeatureMapThreads, kRows, 4, kWide>(thread, buffers, p.maps, map_of, true, rows,
                                                 p.map);
    __syncthreads();
    add_shares<kFeatureMapThreads, kRows>(thread, buffers, p.maps, map_of, rows, p.map,
                                          p.activation.skip);
    __syncthreads();
    const auto scale_of = [](int) { return 1.f; };
    activate_rows<kFeatureMapThreads, kRows>(thread, buffers, p.activation, scale_of, rows, p.map,
                                             phi);
    __syncthreads();
    if (r < rows) {
      T* row = row_of<T>(p.y, batch, head, token + r);
      for (int c = lane * per; c < p.map.F; c += 32 * per) {
        Chunk<T> chunk = {};
#pragma unroll
        for (int i = 0; i < per; i++) {
          if (c + i < p.map.F) chunk.at[i] = from_float<T>(phi[(c + i) * kRows + r]);
        }
        store_chunk<T, kWide>(row, c, p.map.F, chunk);
      }
    }
    // The next rows overwrite phi two barriers later; x is not read any more.
  }
}

}  // namespace cuda
}  // namespace lol
