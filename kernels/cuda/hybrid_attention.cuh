// hybrid_attention (SPEC 3): attention.cuh with a softmax window.
#pragma once
#include "attention.cuh"

namespace lol {
namespace cuda {

template <class T, int kD, int kf, int kSides, int kV, int kChunk, int kSlots>
__global__ void __launch_bounds__(
    32 * AttentionTiles{sizeof(Tiled<T>), kD, kf, kSides, kV, kChunk, kSlots}.warps())
    hybrid_attention(const __grid_constant__ AttentionParams params) {
  Attention<T, kD, kf, kSides, kV, kChunk, kSlots, true>(params,
                                                         ptx::dynamic_shared<unsigned char>())
      .run();
}

}  // namespace cuda
}  // namespace lol
