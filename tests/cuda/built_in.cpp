// Launches of built-in kernels, by the rules of the CUDA runtime; fails with a line on stderr.
#include "kernels/cuda/built_in.cu"

#include <cstdio>

int lol::fail(const char*, ...) { return LOL_EINVAL; }

namespace {

const int kernel = 0;
const lol::cuda::BuiltIn kernels[] = {{"kernel", &kernel}};
const lol::cuda::BuiltIns built_ins(kernels);

int launch(int64_t shared_bytes, int device = 0) {
  lol_cuda_launch launch = {};
  launch.kernel = "kernel";
  launch.blocks = launch.threads = 1;
  launch.shared_bytes = shared_bytes;
  launch.context.device = device;
  return lol::cuda::launch_built_in(&launch, nullptr);
}

int failed(const char* what) { return std::fprintf(stderr, "%s\n", what), 1; }

}  // namespace

int main() {
  if (launch(100 * 1024) != LOL_OK || launch(50 * 1024) != LOL_OK) return failed("a launch");
  // Another thread may be between asking for 100 KB and launching.
  if (runtime::most_shared[&kernel] < 100 * 1024) return failed("a launch takes another's memory");
  if (launch(228 * 1024) != LOL_EUNSUPPORTED) return failed("more than a block has is launched");
  cudaSetDevice(1);
  if (launch(100, 2) != LOL_OK || runtime::launched_on != 2) return failed("another device");
  if (runtime::device != 1) return failed("the device before is not current any more");
  return 0;
}
