// Which keys a query attends by softmax (SPEC 2).
#pragma once
#include "params.h"

namespace lol {
namespace cuda {

__device__ __forceinline__ int at_least(int x, int least) { return x < least ? least : x; }
__device__ __forceinline__ int at_most(int x, int most) { return x > most ? most : x; }

// First key of query i's softmax window, sinks apart.
template <class Params>
__device__ __forceinline__ int window_start(const Params& p, int i) {
  if (p.window == 0) return i + 1;
  return at_least(p.terrace ? (i / p.window - 1) * p.window : i - p.window + 1, 0);
}

}  // namespace cuda
}  // namespace lol
