#include "plan.h"
#include <algorithm>
#include <initializer_list>

#include "../arguments.h"
#include "../check.h"
#include "instances.h"
#include "plan_tensors.h"

namespace lol {
namespace cuda {
namespace {

// What a block may use on every GPU from sm_80 on (sm_86 and sm_89 have 99 KB), and what of it the
// tile of keys gets: at most so much that two blocks share a multiprocessor of the larger ones.
constexpr int kSharedBytes = 99 * 1024, kTileBytes = 48 * 1024;

const char* const feature_map_instances[] = {
#define LOL_NAME(T, wide) "lol::cuda::feature_map<" #T ", " #wide ">",
    LOL_FEATURE_MAP_INSTANCES(LOL_NAME)
#undef LOL_NAME
};

struct StepInstance {
  const char* kernel;
  int lanes, rows, queries;
  bool wide;
  int threads() const { return step_threads(lanes, queries); }
  int F() const { return threads() / lanes * rows; }
};
const StepInstance step_instances[] = {
#define LOL_NAME(T, lanes, rows, queries, wide)                                                \
  {"lol::cuda::hybrid_attention_step<" #T ", " #lanes ", " #rows ", " #queries ", " #wide ">", \
   lanes, rows, queries, wide},
    LOL_STEP_INSTANCES(LOL_NAME)
#undef LOL_NAME
};
// Of each of the three number types, whose codes are 0 to 2.
constexpr int kInstances = sizeof(step_instances) / sizeof(*step_instances) / 3;

// Of those for as many queries or more, the first one that holds F; of those with as many features,
// the first one that holds V, or the widest.
const StepInstance& instance_for(int dtype, int F, int V, int queries, bool wide) {
  const StepInstance *of_dtype = step_instances + dtype * kInstances, *found = nullptr;
  for (int i = 0; i < kInstances; i++) {
    const StepInstance& at = of_dtype[i];
    if (at.wide != wide || at.queries < queries || at.F() < F) continue;
    if (found && (at.F() > found->F() || at.queries > found->queries || 4 * found->lanes >= V))
      break;
    found = &at;
  }
  return *found;
}

// Hands out shared memory.
class Offsets {
 public:
  int take(int64_t bytes) {
    const int at = next_;
    next_ = round_up(at + static_cast<int>(bytes), 16);
    return at;
  }
  int bytes() const { return next_; }

 private:
  int next_ = 0;
};

}  // namespace

int plan(const lol_feature_map_args& a, int most_shared_bytes, Plan* plan,
         FeatureMapParams* params) {
  FeatureMapParams p = {};
  p.x = rows_of(a.x);
  p.y = rows_of(a.y);
  p.H = static_cast<int>(a.x.shape[1]);
  p.T = static_cast<int>(a.x.shape[2]);
  p.maps = maps_of(a.features, p.H);
  p.map = shape_of(a.features);
  p.activation = activation_of(a.features);
  Offsets at;
  p.shared.partial = at.take(kRows * kFeatureMapThreads * 16);
  p.shared.x = at.take(kRows * p.map.ld * 4);
  p.shared.z = at.take(kRows * p.map.f * 4);
  p.shared.phi = at.take(kRows * p.map.F * 4);
  const bool wide = is_wide(a.x) && is_wide(a.y) && is_wide(a.features.weight);
  const int64_t strips = (p.T + kStrip - 1) / kStrip;
  *params = p;
  *plan = {feature_map_instances[2 * a.x.dtype + (wide ? 0 : 1)], strips * p.H * a.x.shape[0],
           kFeatureMapThreads, at.bytes()};
  return at.bytes() <= most_shared_bytes ? LOL_OK : LOL_EUNSUPPORTED;
}

int plan(const lol_hybrid_attention_step_args& a, int most_shared_bytes, Plan* plan,
         StepParams* params) {
  if (a.key_padding_mask.data) {
    fail(
        "hybrid_attention_step: key_padding_mask is not for the CUDA kernels: pack the sequences "
        "(cu_seqlens), or use the Triton kernels");
    return LOL_EUNSUPPORTED;
  }
  const lol_state& s = a.state;
  StepParams p = {};
  p.q = rows_of(a.q);
  p.k = rows_of(a.k);
  p.v = rows_of(a.v);
  p.o = rows_of(a.o);
  p.H = static_cast<int>(a.q.shape[1]);
  p.Hk = static_cast<int>(a.k.shape[1]);
  p.Hs = static_cast<int>(s.kv.shape[1]);
  p.T = static_cast<int>(a.q.shape[2]);
  p.V = static_cast<int>(a.v.shape[3]);
  p.map_q = maps_of(a.feature_q, p.H);
  p.map_k = maps_of(a.feature_k, p.Hs);
  p.map = shape_of(a.feature_k);
  p.activation = activation_of(a.feature_k);
  p.gate = static_cast<const float*>(a.gate.data);
  p.scale = static_cast<float>(a.scale);
  // Where all keys are linear their factor cancels, and could make a sum of small features zero.
  p.affine = a.affine != 0 && (a.window > 0 || s.k_sink.shape[2] > 0);
  p.window = static_cast<int>(a.window);
  p.terrace = a.window_kind == LOL_TERRACE;
  p.sink = static_cast<int>(s.k_sink.shape[2]);
  p.ring = static_cast<int>(s.k_ring.shape[2]);
  const int span = static_cast<int>(window_span(a.window, a.window_kind));
  p.slack = p.ring - span - static_cast<int>(a.lazy);
  p.slots = static_cast<int>(s.length.shape[0]);
  p.kv = static_cast<float*>(s.kv.data);
  p.ksum = static_cast<float*>(s.ksum.data);
  p.k_ring = s.k_ring.data;
  p.v_ring = s.v_ring.data;
  p.k_sink = s.k_sink.data;
  p.v_sink = s.v_sink.data;
  p.length = static_cast<int*>(s.length.data);
  p.folded = static_cast<int64*>(s.folded.data);
  p.state_indices = indices_of(a.state_indices);
  p.cu_seqlens = indices_of(a.cu_seqlens);

  bool wide = is_wide(a.feature_q.weight) && is_wide(a.feature_k.weight) && is_wide(s.kv);
  for (const lol_tensor* t : {&a.q, &a.k, &a.v, &a.o, &s.k_ring, &s.v_ring, &s.k_sink, &s.v_sink})
    wide &= is_wide(*t);
  // One query finds one key that leaves; several, or of a window that moves by more, a few of each.
  const bool one = p.T == 1 && p.H == p.Hs && p.slack == 0 && !a.lazy && !p.terrace;
  const StepInstance& instance = instance_for(a.q.dtype, p.map.F, p.V, one ? 1 : kRows, wide);
  const int rows = instance.queries, threads = instance.threads(), columns = 4 * instance.lanes;

  Offsets at;
  p.shared.sequence = at.take(kSequenceBytes);
  p.shared.queries = at.take(rows * kQueryBytes);
  p.shared.partial = at.take(rows * threads * 16);
  p.shared.q = at.take(rows * p.map.ld * 4);
  p.shared.x = at.take(rows * p.map.ld * 4);
  p.shared.z = at.take(2 * rows * p.map.f * 4);
  p.shared.phi_q = at.take(rows * p.map.F * 4);
  p.shared.phi_k = at.take(rows * p.map.F * 4);
  p.shared.leaving = at.take(rows * columns * 4);
  p.shared.ksum = at.take(p.map.F * 4);
  p.shared.pairs = at.take(rows * rows * 4);
  // Where four threads read a key, and eight at once, two keys are to lie in different banks.
  p.k_row = round_up(p.map.D * size_of(a.q.dtype), 128) + 64;
  const int v_row = columns * size_of(a.q.dtype), key_bytes = p.k_row + v_row + rows * 4;
  const int room = kSharedBytes - at.bytes() - 64;
  const int most = (room < kTileBytes ? room : kTileBytes) / key_bytes / 16 * 16;
  const int64_t wanted = p.sink + static_cast<int64_t>(span) + p.T;
  p.keys = wanted < most ? round_up(static_cast<int>(wanted), 16) : most;
  p.shared.scores = at.take(rows * p.keys * 4);
  p.shared.k = at.take(p.keys * p.k_row);
  p.shared.v = at.take(p.keys * v_row);

  p.sequences = static_cast<int>(a.cu_seqlens.data ? a.cu_seqlens.shape[0] - 1 : a.q.shape[0]);
  // Tokens after the last sequence are cleared by its blocks, or by those of an absent one.
  const int64_t sequences = std::max(p.sequences, 1);
  *params = p;
  *plan = {instance.kernel, a.q.shape[0] * p.T > 0 ? sequences * p.Hs : 0, threads, at.bytes()};
  return at.bytes() <= most_shared_bytes ? LOL_OK : LOL_EUNSUPPORTED;
}

}  // namespace cuda
}  // namespace lol
