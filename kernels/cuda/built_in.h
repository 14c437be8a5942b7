// The kernels that nvcc compiles into the library. A file of an operator, such as
// hybrid_attention.cu, is compiled once for every number type, LOL_NUMBER (f32, bf16, f16), and
// adds its instances to a list, so that a build has as many files to compile at once.
#pragma once

namespace lol {
namespace cuda {

struct BuiltIn {
  const char* name;  // a C++ name expression
  const void* kernel;
};

class BuiltIns {
 public:
  template <int n>
  explicit BuiltIns(const BuiltIn (&kernels)[n]) : kernels_(kernels), count_(n), next_(all_) {
    all_ = this;
  }
  static const BuiltIn* find(const char* name);

 private:
  const BuiltIn* kernels_;
  int count_;
  const BuiltIns* next_;
  static const BuiltIns* all_;
};

}  // namespace cuda
}  // namespace lol

#define LOL_BUILT_IN(Params, kernel, ...)      \
  {"lol::cuda::" #kernel "<" #__VA_ARGS__ ">", \
   reinterpret_cast<const void*>(static_cast<void (*)(Params)>(kernel<__VA_ARGS__>))},

// LOL_OF_NUMBER(LOL_STEP_INSTANCES) is LOL_STEP_INSTANCES_f32, for LOL_NUMBER = f32.
#define LOL_JOIN(a, b) a##_##b
#define LOL_JOIN_EXPANDED(a, b) LOL_JOIN(a, b)
#define LOL_OF_NUMBER(instances) LOL_JOIN_EXPANDED(instances, LOL_NUMBER)
