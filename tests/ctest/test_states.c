/* Decoding states from C: when lazy ones fold, and what is refused of states, sums and statistics.
 */
#include "testing.h"

enum { R = 5, N = 12, POOL = 70 };
static float q[N * H * D], k[N * H * D], v[N * H * V], weight[H * D * F], gate[H];
static float out[POOL * H * T * V], stat[2][H * T], kv[POOL * H * WIDE * V], ksum[POOL * H * WIDE];
static float k_ring[POOL * H * R * D], v_ring[POOL * H * R * V];
static int64_t length[POOL], folded[POOL];

static lol_features features(void) {
  lol_features f = {0};
  f.weight = TENSOR(weight, H, D, F);
  f.two_sided = 1;
  f.eps = 1e-12;
  return f;
}
static lol_hybrid_attention_step_args step_args(int64_t batch) {
  lol_hybrid_attention_step_args a = {0};
  a.struct_size = sizeof(a);
  a.context.device = -1;
  a.q = TENSOR(q, batch, H, 1, D);
  a.k = TENSOR(k, batch, H, 1, D);
  a.v = TENSOR(v, batch, H, 1, V);
  a.q.stride[0] = a.k.stride[0] = a.v.stride[0] = 0; /* the same token for all */
  a.feature_q = a.feature_k = features();
  a.gate = TENSOR(gate, H);
  a.window = WINDOW;
  a.scale = 0.5;
  a.state = state_of(kv, ksum, k_ring, v_ring, length, folded, batch, R);
  a.o = TENSOR(out, batch, H, 1, V);
  return a;
}
#define REFUSES(call, args, word)          \
  do {                                     \
    CHECK(call(&(args)) == LOL_EINVAL);    \
    CHECK(strstr(lol_last_error(), word)); \
  } while (0)

static void lazy_states_fold_lazy_and_one_tokens_at_once(void) {
  const int64_t want[] = {0, 0, 0, 0, 0, 3,
                          3, 3, 6, 6, 6, 9}; /* a slack of 3, of which 2 are lazy */
  lol_hybrid_attention_step_args a = step_args(1);
  a.lazy = 2;
  for (int t = 0; t < N; t++) {
    CHECK(lol_hybrid_attention_step(&a) == LOL_OK);
    CHECK(length[0] == t + 1 && folded[0] == want[t]);
  }
  a.lazy = 4;
  REFUSES(lol_hybrid_attention_step, a, "lazy is 4, needs 0 up to the ring's slack of 3");
}

static void steps_are_refused(void) {
  lol_hybrid_attention_step_args a = step_args(2);
  a.o.stride[0] = 0;
  REFUSES(lol_hybrid_attention_step, a, "o is written and has stride 0");
  a = step_args(2);
  a.state.ksum.shape[2] = F;
  REFUSES(lol_hybrid_attention_step, a, "state.ksum has shape");
  a = step_args(POOL); /* more than are compared in pairs */
  int64_t slots[POOL];
  for (int i = 0; i < POOL; i++) slots[i] = i;
  slots[POOL - 1] = 3;
  a.state_indices = tensor(slots, LOL_I64, 1, (const int64_t[]){POOL});
  REFUSES(lol_hybrid_attention_step, a, "state_indices names slot 3 twice");
}

static void attention_is_refused(void) {
  lol_linear_attention_args a = {0};
  a.struct_size = sizeof(a);
  a.context.device = -1;
  a.q = a.k = TENSOR(q, B, H, T, D);
  a.v = a.o = TENSOR(v, B, H, T, V);
  a.o.data = out;
  a.scale = 1;
  a.den = TENSOR(stat[0], B, H, T);
  a.kv = TENSOR(kv, B, H, D, V);
  a.ksum = TENSOR(ksum, B, H, D);
  CHECK(lol_linear_attention(&a) == LOL_OK);
  a.kv0 = a.kv;
  REFUSES(lol_linear_attention, a, "kv0 and ksum0 come together or not at all");

  lol_hybrid_attention_args h = {0};
  h.struct_size = sizeof(h);
  h.context.device = -1;
  h.q = a.q, h.k = a.k, h.v = a.v, h.o = a.o;
  h.feature_q = h.feature_k = features();
  h.gate = TENSOR(gate, H);
  h.scale = 1;
  h.m = TENSOR(stat[0], B, H, T);
  h.den = TENSOR(stat[1], B, H, T);
  CHECK(lol_hybrid_attention(&h) == LOL_OK);
  h.den.shape[2] = T - 1;
  REFUSES(lol_hybrid_attention, h, "den has shape");
  h.den.shape[2] = T;
  lol_hybrid_attention_backward_args b = {.struct_size = sizeof(b), h};
  b.do_ = h.o;
  b.do_.dtype = LOL_BF16;
  REFUSES(lol_hybrid_attention_backward, b, "do is bfloat16");
  b.do_ = h.o;
  b.forward.struct_size = 8;
  REFUSES(lol_hybrid_attention_backward, b, "forward.struct_size is 8");
}

int main(void) {
  FILL(q, 1);
  FILL(k, 2);
  FILL(v, 3);
  FILL(weight, 4);
  lazy_states_fold_lazy_and_one_tokens_at_once();
  steps_are_refused();
  attention_is_refused();
  return 0;
}
