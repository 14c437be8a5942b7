#include "cuda_harness.h"
#include "planted.cuh"
void run(emulator::Arguments& a) {
  const float* in = a.tensor<float>("in");
  float* out = a.tensor<float>("out");
  const int bug = a.number<int>("bug");
  auto kernel = bug == 0 ? reverse<0> : bug == 1 ? reverse<1> : bug == 2 ? reverse<2> : bug == 4 ? reverse<4> : bug == 5 ? reverse<5> : reverse<7>;
  emulator::launch(kernel, a.number<unsigned>("blocks"), 128, 0, in, out);
}
