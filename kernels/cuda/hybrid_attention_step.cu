#include "built_in.h"
#include "hybrid_attention_step.cuh"
#include "instances.h"

namespace lol {
namespace cuda {
namespace {

#define LOL_KERNEL(...) LOL_BUILT_IN(StepParams, hybrid_attention_step, __VA_ARGS__)
const BuiltIn kernels[] = {LOL_OF_NUMBER(LOL_STEP_INSTANCES)(LOL_KERNEL)};
const BuiltIns built_ins(kernels);

}  // namespace
}  // namespace cuda
}  // namespace lol
