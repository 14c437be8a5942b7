#include "planted.cuh"

#include "cuda_harness.h"

namespace {

using Kernel = void (*)(const float*, float*);
using Sum = void (*)(const float*, float*, unsigned*, float*);

const std::map<std::string, Kernel> kReverse = {
    {"none", reverse<Bug::none>},
    {"global_read", reverse<Bug::global_read>},
    {"global_write", reverse<Bug::global_write>},
    {"static_shared", reverse<Bug::static_shared>},
    {"dynamic_shared", reverse<Bug::dynamic_shared>},
    {"local_array", reverse<Bug::local_array>},
    {"no_barrier", reverse<Bug::no_barrier>},
    {"divergent_barrier", reverse<Bug::divergent_barrier>},
    {"late_barrier", reverse<Bug::late_barrier>},
    {"half_warp", reverse<Bug::half_warp>},
    {"lane_outside", reverse<Bug::lane_outside>},
    {"no_wait", reverse<Bug::no_wait>},
    {"copy_out_of_shared", reverse<Bug::copy_out_of_shared>},
    {"early_copy", reverse<Bug::early_copy>},
    {"two_copies", reverse<Bug::two_copies>},
    {"same_output", reverse<Bug::same_output>},
};
const std::map<std::string, Kernel> kOneBlock = {
    {"vectors", copy_vectors<Bug::none>},
    {"misaligned_load", copy_vectors<Bug::misaligned_load>},
    {"misaligned_store", copy_vectors<Bug::misaligned_store>},
    {"matrix", load_matrix<Bug::none>},
    {"misaligned_row", load_matrix<Bug::misaligned_row>},
    {"row_elsewhere", load_matrix<Bug::row_elsewhere>},
    {"warp", reverse_warp<Bug::none>},
    {"no_warp_barrier", reverse_warp<Bug::no_warp_barrier>},
};
const std::map<std::string, Sum> kSum = {
    {"sum", add_blocks<Bug::none>},
    {"sum_acq_rel", add_blocks_acq_rel},
    {"no_release", add_blocks<Bug::no_release>},
    {"no_acquire", add_blocks<Bug::no_acquire>},
};

}  // namespace

void run(emulator::Arguments& arguments) {
  const std::string name = arguments.text("kernel");
  const auto* in = arguments.tensor<float>("x");
  auto* out = arguments.tensor<float>("y");
  const auto blocks = arguments.number<unsigned>("blocks");
  if (kReverse.count(name))
    emulator::launch(kReverse.at(name), blocks, kThreads, kThreads * sizeof(float), in, out);
  else if (kOneBlock.count(name))
    emulator::launch(kOneBlock.at(name), 1, 32, 0, in, out);
  else
    emulator::launch(kSum.at(name), blocks, 1, 0, in, arguments.tensor<float>("partial"),
                     arguments.tensor<unsigned>("arrived"), out);
}
