#include "launch.h"

#include "../check.h"
#include "plan.h"

namespace lol {
namespace cuda {
namespace {

#ifdef LOL_HAVE_CUDA
constexpr lol_cuda_launcher built_in = launch_built_in;
#else
constexpr lol_cuda_launcher built_in = nullptr;
#endif

struct Launcher {
  lol_cuda_launcher launch;
  void* user;
};
Launcher of_process = {built_in, nullptr};
thread_local Launcher of_thread = {nullptr, nullptr};

const Launcher& launcher() { return of_thread.launch ? of_thread : of_process; }

// The first choice; where the device is too small for it, the next one, if there is any.
template <class Params, class Args>
int plan_and_launch(const Args& a) {
  for (int most_shared_bytes = INT32_MAX;;) {
    Plan planned;
    Params params;
    if (const int status = plan(a, most_shared_bytes, &planned, &params)) return status;
    if (planned.blocks == 0) return LOL_OK;
    if (planned.blocks > INT32_MAX) return fail("lolcats_ops: too many blocks for one launch");
    const lol_cuda_launch launch = {planned.kernel,
                                    static_cast<uint32_t>(planned.blocks),
                                    static_cast<uint32_t>(planned.threads),
                                    static_cast<uint32_t>(planned.shared_bytes),
                                    &params,
                                    sizeof(params),
                                    a.context};
    const int status = launcher().launch(&launch, launcher().user);
    if (status != LOL_EUNSUPPORTED) return status;
    most_shared_bytes = planned.shared_bytes - 1;
  }
}

}  // namespace

bool can_launch() { return launcher().launch != nullptr; }
int run(const lol_feature_map_args& a) { return plan_and_launch<FeatureMapParams>(a); }
int run(const lol_linear_attention_args& a) { return plan_and_launch<AttentionParams>(a); }
int run(const lol_hybrid_attention_args& a) { return plan_and_launch<AttentionParams>(a); }
int run(const lol_hybrid_attention_step_args& a) { return plan_and_launch<StepParams>(a); }

}  // namespace cuda
}  // namespace lol

extern "C" {

void lol_set_cuda_launcher(lol_cuda_launcher launcher, void* user) {
  lol::cuda::of_process = {launcher ? launcher : lol::cuda::built_in, user};
}
void lol_set_thread_cuda_launcher(lol_cuda_launcher launcher, void* user) {
  lol::cuda::of_thread = {launcher, user};
}
int lol_can_launch_cuda(void) { return lol::cuda::can_launch(); }
int lol_has_cuda(void) { return lol::cuda::built_in != nullptr; }

}  // extern "C"
