#include "built_in.h"
#include "feature_map.cuh"
#include "instances.h"

namespace lol {
namespace cuda {
namespace {

#define LOL_KERNEL(...) LOL_BUILT_IN(FeatureMapParams, feature_map, __VA_ARGS__)
const BuiltIn kernels[] = {LOL_OF_NUMBER(LOL_FEATURE_MAP_INSTANCES)(LOL_KERNEL)};
const BuiltIns built_ins(kernels);

}  // namespace
}  // namespace cuda
}  // namespace lol
