#include <algorithm>

#include "attention_instances.h"
#include "plan.h"
#include "plan_tensors.h"

namespace lol {
namespace cuda {
namespace {

struct AttentionInstance {
  const char *hybrid, *linear;
  int dtype;
  AttentionTiles tiles;
};
// Of "float", "lol::bf16" and "lol::f16": the number of tensors, and the bytes of one in tiles
// (numbers.cuh).
constexpr int type_code(const char* name) {
  return name[0] == 'f' ? LOL_F32 : name[5] == 'b' ? LOL_BF16 : LOL_F16;
}
constexpr int tiled_bytes(int dtype) { return dtype == LOL_BF16 ? 2 : 4; }
const AttentionInstance attention_instances[] = {
#define LOL_NAME(T, ...)                                    \
  {"lol::cuda::hybrid_attention<" #T ", " #__VA_ARGS__ ">", \
   "lol::cuda::linear_attention<" #T ", " #__VA_ARGS__ ">", \
   type_code(#T),                                           \
   {tiled_bytes(type_code(#T)), __VA_ARGS__}},
    LOL_ATTENTION_INSTANCES(LOL_NAME)
#undef LOL_NAME
};

// The first one that holds the problem in so much shared memory, or null.
const AttentionInstance* instance_for(int dtype, const AttentionParams& p, int most_shared_bytes) {
  for (const AttentionInstance& at : attention_instances) {
    if (at.dtype == dtype && at.tiles.D >= p.D && at.tiles.f >= p.f && at.tiles.sides >= p.sides &&
        at.tiles.shared_bytes() <= most_shared_bytes)
      return &at;
  }
  return nullptr;
}

// Few sequences and heads are cut into segments, as many as find an idle multiprocessor; an A100
// has 108. With eight a pass takes about a third of its time, and more would gain little.
int segments_for(int64 blocks, int T) {
  constexpr int kMultiprocessors = 108, kMost = 8, kLeastTokens = 512;
  int segments = 1;
  while (segments < kMost && blocks * (segments + 1) <= kMultiprocessors &&
         T / (segments + 1) >= kLeastTokens)
    segments++;
  return segments;
}

// What both operators have; Args: of either.
template <class Args>
int plan_attention(const Args& a, int most_shared_bytes, const char* AttentionInstance::* kernel,
                   Plan* plan, AttentionParams* params) {
  const bool mapped = a.feature_k.weight.data != nullptr;
  AttentionParams& p = *params;
  p.q = rows_of(a.q);
  p.k = rows_of(a.k);
  p.v = rows_of(a.v);
  p.o = rows_of(a.o);
  p.H = static_cast<int>(a.q.shape[1]);
  p.Hk = static_cast<int>(a.k.shape[1]);
  p.Hs = mapped ? static_cast<int>(a.feature_k.weight.shape[0]) : p.Hk;
  p.T = static_cast<int>(a.q.shape[2]);
  p.D = static_cast<int>(a.q.shape[3]);
  p.V = static_cast<int>(a.v.shape[3]);
  p.f = mapped ? static_cast<int>(a.feature_k.weight.shape[2]) : p.D;
  p.sides = mapped && a.feature_k.two_sided ? 2 : 1;
  if (mapped) {
    p.map_q = maps_of(a.feature_q, p.H);
    p.map_k = maps_of(a.feature_k, p.H);
  }
  p.activation = activation_of(a.feature_k);
  if (!mapped) p.activation = {LOL_IDENTITY, false, false, 0.f};
  p.scale = static_cast<float>(a.scale);
  p.den = static_cast<float*>(a.den.data);
  p.cu_seqlens = indices_of(a.cu_seqlens);
  p.mask = {static_cast<const bool*>(a.key_padding_mask.data), a.key_padding_mask.stride[0]};
  p.sequences = static_cast<int>(a.cu_seqlens.data ? a.cu_seqlens.shape[0] - 1 : a.q.shape[0]);
  p.wide = is_wide(a.q) && is_wide(a.k) && is_wide(a.v) && is_wide(a.o);

  const AttentionInstance* at = instance_for(a.q.dtype, p, most_shared_bytes);
  if (!at) return LOL_EUNSUPPORTED;
  const int64 slices = (p.V + at->tiles.V - 1) / at->tiles.V;
  // Tokens after the last sequence are cleared by its blocks, or by those of an absent one.
  const int64 sequences = p.sequences ? p.sequences : a.q.shape[0] > 0 && p.T > 0;
  const int64 blocks = sequences * p.H * slices;
  p.segments = segments_for(blocks, p.T);
  *plan = {at->*kernel, blocks * p.segments, 32 * at->tiles.warps(), at->tiles.shared_bytes()};
  return LOL_OK;
}

}  // namespace

int plan(const lol_hybrid_attention_args& a, int most_shared_bytes, Plan* plan,
         AttentionParams* params) {
  AttentionParams p = {};
  p.gate = static_cast<const float*>(a.gate.data);
  // Where all keys are linear their factor cancels, and could make a sum of small features zero.
  p.affine = a.affine != 0 && (a.window > 0 || a.sink > 0);
  p.normalize = true;
  // Longer than the tokens, a window holds all of them, and sinks are all of them.
  p.window = static_cast<int>(std::min(a.window, a.q.shape[2]));
  p.terrace = a.window_kind == LOL_TERRACE;
  p.sink = static_cast<int>(std::min(a.sink, a.q.shape[2]));
  p.m = static_cast<float*>(a.m.data);
  *params = p;
  return plan_attention(a, most_shared_bytes, &AttentionInstance::hybrid, plan, params);
}

int plan(const lol_linear_attention_args& a, int most_shared_bytes, Plan* plan,
         AttentionParams* params) {
  AttentionParams p = {};
  p.normalize = a.normalize != 0;
  p.eps = static_cast<float>(a.eps);
  p.kv0 = static_cast<const float*>(a.kv0.data);
  p.ksum0 = static_cast<const float*>(a.ksum0.data);
  const bool any = !a.cu_seqlens.data || a.cu_seqlens.shape[0] > 1;
  p.kv = any ? static_cast<float*>(a.kv.data) : nullptr;
  p.ksum = any ? static_cast<float*>(a.ksum.data) : nullptr;
  *params = p;
  return plan_attention(a, most_shared_bytes, &AttentionInstance::linear, plan, params);
}

}  // namespace cuda
}  // namespace lol
