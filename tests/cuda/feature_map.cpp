#include "kernels/cuda/feature_map.cuh"

#include "launch.h"

static const Instance<lol::cuda::FeatureMapParams> instances[] = {
#define ENTRY(T, wide) \
  {"lol::cuda::feature_map<" #T ", " #wide ">", lol::cuda::feature_map<T, wide>},
    INSTANCES(ENTRY)
#undef ENTRY
};

void run(emulator::Arguments& a) {
  lol_feature_map_args args = {};
  args.x = tensor_of(a, "x");
  args.y = tensor_of(a, "y");
  args.features = features_of(a, "x");
  run_emulated(args, instances);
}
