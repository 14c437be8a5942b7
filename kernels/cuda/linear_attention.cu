#include "attention_instances.h"
#include "built_in.h"
#include "linear_attention.cuh"

namespace lol {
namespace cuda {
namespace {

#define LOL_KERNEL(...) LOL_BUILT_IN(AttentionParams, linear_attention, __VA_ARGS__)
const BuiltIn kernels[] = {LOL_OF_NUMBER(LOL_ATTENTION_INSTANCES)(LOL_KERNEL)};
const BuiltIns built_ins(kernels);

}  // namespace
}  // namespace cuda
}  // namespace lol
