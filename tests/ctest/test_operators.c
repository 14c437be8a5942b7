/* Every function of the C ABI, called as a C program would, on each instruction set. */
#include "testing.h"

static float q[B * H * T * D], k[B * H * T * D], v[B * H * T * V];
static float weight_q[H * D * F], weight_k[H * D * F], gate[H];
static float out[B * H * T * V], m[B * H * T], den[B * H * T];
static float d_out[B * H * T * V], dq[B * H * T * D], dk[B * H * T * D], dv[B * H * T * V];
static float dweight_q[H * D * F], dweight_k[H * D * F], dgate[H];

static lol_features features(float* weight) {
  lol_features f = {0};
  f.weight = TENSOR(weight, H, D, F);
  f.activation = LOL_SOFTMAX;
  f.two_sided = 1;
  f.eps = 1e-12;
  return f;
}

static lol_hybrid_attention_args hybrid_args(void) {
  lol_hybrid_attention_args args = {0};
  args.struct_size = sizeof(args);
  args.context.device = -1;
  args.q = TENSOR(q, B, H, T, D);
  args.k = TENSOR(k, B, H, T, D);
  args.v = TENSOR(v, B, H, T, V);
  args.feature_q = features(weight_q);
  args.feature_k = features(weight_k);
  args.gate = TENSOR(gate, H);
  args.window = WINDOW;
  args.window_kind = LOL_SLIDING;
  args.scale = 0.5;
  args.o = TENSOR(out, B, H, T, V);
  args.m = TENSOR(m, B, H, T);
  args.den = TENSOR(den, B, H, T);
  return args;
}

static void features_of_a_two_sided_softmax_sum_to_two(void) {
  static float y[B * H * T * WIDE], dy[B * H * T * WIDE], dx[B * H * T * D];
  lol_feature_map_args args = {.struct_size = sizeof(args),
                               {-1, NULL},
                               TENSOR(q, B, H, T, D),
                               features(weight_q),
                               TENSOR(y, B, H, T, WIDE)};
  CHECK(lol_feature_map(&args) == LOL_OK);
  for (int row = 0; row < B * H * T; row++) {
    float sum = 0;
    for (int i = 0; i < WIDE; i++) sum += y[row * WIDE + i];
    CHECK(fabsf(sum - 2) < 1e-5f);
  }

  /* The rows sum to a constant, so a constant gradient gives none. */
  for (int i = 0; i < B * H * T * WIDE; i++) dy[i] = 1;
  lol_feature_map_backward_args backward = {0};
  backward.struct_size = sizeof(backward);
  backward.context.device = -1;
  backward.dy = TENSOR(dy, B, H, T, WIDE);
  backward.x = args.x;
  backward.features = args.features;
  backward.dx = TENSOR(dx, B, H, T, D);
  backward.dweight = TENSOR(dweight_q, H, D, F);
  CHECK(lol_feature_map_backward(&backward) == LOL_OK);
  static const float zero[B * H * T * D];
  CHECK(is_close(dx, zero, B * H * T * D, 1e-5f));
}

static void linear_attention_of_one_value_returns_it(void) {
  static float ones[B * H * T * V], kv[B * H * WIDE * V], ksum[B * H * WIDE];
  for (int i = 0; i < B * H * T * V; i++) ones[i] = 1;
  lol_linear_attention_args args = {0};
  args.struct_size = sizeof(args);
  args.context.device = -1;
  args.q = TENSOR(q, B, H, T, D);
  args.k = TENSOR(k, B, H, T, D);
  args.v = TENSOR(ones, B, H, T, V);
  args.feature_q = features(weight_q);
  args.feature_k = features(weight_k);
  args.scale = 1;
  args.normalize = 1;
  args.eps = 1e-12;
  args.o = TENSOR(out, B, H, T, V);
  args.den = TENSOR(den, B, H, T);
  args.kv = TENSOR(kv, B, H, WIDE, V);
  args.ksum = TENSOR(ksum, B, H, WIDE);
  CHECK(lol_linear_attention(&args) == LOL_OK);
  CHECK(is_close(out, ones, B * H * T * V, 1e-5f));
  for (int i = 0; i < B * H * WIDE; i++) CHECK(fabsf(kv[i * V] - ksum[i]) < 1e-5f);

  lol_linear_attention_backward_args backward = {0};
  backward.struct_size = sizeof(backward);
  backward.forward = args;
  backward.do_ = TENSOR(d_out, B, H, T, V);
  backward.dq = TENSOR(dq, B, H, T, D);
  backward.dk = TENSOR(dk, B, H, T, D);
  backward.dv = TENSOR(dv, B, H, T, V);
  backward.dweight_q = TENSOR(dweight_q, H, D, F);
  backward.dweight_k = TENSOR(dweight_k, H, D, F);
  CHECK(lol_linear_attention_backward(&backward) == LOL_OK);
  static const float zero[B * H * T * D]; /* the output does not depend on q or k */
  CHECK(is_close(dq, zero, B * H * T * D, 1e-4f));
  CHECK(is_close(dk, zero, B * H * T * D, 1e-4f));
}

static void steps_on_a_state_equal_one_call(void) {
  lol_hybrid_attention_args args = hybrid_args();
  CHECK(lol_hybrid_attention(&args) == LOL_OK);

  float kv[B * H * WIDE * V] = {0}, ksum[B * H * WIDE] = {0};
  float k_ring[B * H * RING * D], v_ring[B * H * RING * V];
  int64_t length[B] = {0}, folded[B] = {0};
  for (int t = 0; t < T; t++) {
    float stepped[B * H * V];
    lol_hybrid_attention_step_args step = {0};
    step.struct_size = sizeof(step);
    step.context.device = -1;
    step.q = TENSOR(q + t * D, B, H, 1, D);
    step.k = TENSOR(k + t * D, B, H, 1, D);
    step.v = TENSOR(v + t * V, B, H, 1, V);
    step.q.stride[1] = step.k.stride[1] = T * D; /* a slice of the whole sequence */
    step.v.stride[1] = T * V;
    step.feature_q = args.feature_q;
    step.feature_k = args.feature_k;
    step.gate = args.gate;
    step.window = args.window;
    step.window_kind = args.window_kind;
    step.scale = args.scale;
    step.state = state_of(kv, ksum, k_ring, v_ring, length, folded, B, RING);
    step.o = TENSOR(stepped, B, H, 1, V);
    CHECK(lol_hybrid_attention_step(&step) == LOL_OK);
    CHECK(length[0] == t + 1);
    for (int h = 0; h < H; h++) CHECK(is_close(stepped + h * V, out + (h * T + t) * V, V, 1e-5f));
  }
}

static void a_window_over_everything_is_the_teacher(void) {
  static float teacher[B * H * T * V], residual[B * H * T * V], delta[B * H * T], lse[B * H * T];
  static float mse, xent, d_mse = 1, d_xent = 0;
  lol_attention_transfer_args args = {0};
  args.struct_size = sizeof(args);
  args.student = hybrid_args();
  args.student.window = T;
  args.teacher = TENSOR(teacher, B, H, T, V);
  args.mse = tensor(&mse, LOL_F32, 0, NULL);
  args.xent = tensor(&xent, LOL_F32, 0, NULL);
  args.residual = TENSOR(residual, B, H, T, V);
  args.delta = TENSOR(delta, B, H, T);
  args.lse = TENSOR(lse, B, H, T);
  CHECK(lol_attention_transfer(&args) == LOL_OK);
  CHECK(mse < 1e-10f);

  lol_attention_transfer_backward_args backward = {0};
  backward.struct_size = sizeof(backward);
  backward.forward = args;
  backward.d_mse = tensor(&d_mse, LOL_F32, 0, NULL);
  backward.d_xent = tensor(&d_xent, LOL_F32, 0, NULL);
  backward.dweight_q = TENSOR(dweight_q, H, D, F);
  backward.dweight_k = TENSOR(dweight_k, H, D, F);
  backward.dgate = TENSOR(dgate, H);
  CHECK(lol_attention_transfer_backward(&backward) == LOL_OK);
  static const float zero[H * D * F];
  CHECK(is_close(dweight_q, zero, H * D * F, 1e-5f));
  CHECK(is_close(dgate, zero, H, 1e-5f));

  /* The same window through hybrid_attention. */
  lol_hybrid_attention_args student = args.student;
  CHECK(lol_hybrid_attention(&student) == LOL_OK);
  CHECK(is_close(out, teacher, B * H * T * V, 1e-5f));
}

static void the_first_query_only_passes_its_value(void) {
  lol_hybrid_attention_backward_args backward = {0};
  backward.struct_size = sizeof(backward);
  backward.forward = hybrid_args();
  CHECK(lol_hybrid_attention(&backward.forward) == LOL_OK);
  CHECK(is_close(out, v, V, 1e-5f));
  for (int i = 0; i < B * H * T * V; i++) d_out[i] = 0;
  for (int i = 0; i < V; i++) d_out[i] = 1;
  backward.do_ = TENSOR(d_out, B, H, T, V);
  backward.dq = TENSOR(dq, B, H, T, D);
  backward.dk = TENSOR(dk, B, H, T, D);
  backward.dv = TENSOR(dv, B, H, T, V);
  backward.dweight_q = TENSOR(dweight_q, H, D, F);
  backward.dweight_k = TENSOR(dweight_k, H, D, F);
  backward.dgate = TENSOR(dgate, H);
  CHECK(lol_hybrid_attention_backward(&backward) == LOL_OK);
  CHECK(is_close(dv, d_out, B * H * T * V, 1e-5f));
}

static int note(const lol_cuda_launch* launch, void* noted) {
  *(lol_cuda_launch*)noted = *launch;
  return LOL_OK;
}

/* For a device that need not be there. */
static void a_thread_is_told_what_would_be_launched(void) {
  lol_hybrid_attention_args args = hybrid_args();
  args.context.device = 5;
  args.q.dtype = args.k.dtype = args.v.dtype = args.o.dtype = LOL_BF16;
  lol_cuda_launch noted = {0};
  lol_set_thread_cuda_launcher(note, &noted);
  CHECK(lol_can_launch_cuda());
  CHECK(lol_hybrid_attention(&args) == LOL_OK);
  CHECK(strstr(noted.kernel, "lol::cuda::hybrid_attention<lol::bf16"));
  CHECK(noted.blocks > 0 && noted.threads > 0 && noted.shared_bytes > 0);
  CHECK(noted.context.device == 5);
  args.gate.dtype = LOL_BF16;
  CHECK(lol_hybrid_attention(&args) == LOL_EINVAL);
  CHECK(strstr(lol_last_error(), "gate"));

  args = hybrid_args();
  args.context.device = 5;
  args.q.shape[2] = INT64_C(1) << 31;
  CHECK(lol_hybrid_attention(&args) == LOL_EINVAL);
  CHECK(strstr(lol_last_error(), "of which a GPU takes no size above 1073741824"));

  lol_set_thread_cuda_launcher(NULL, NULL);
  CHECK(lol_can_launch_cuda() == lol_has_cuda());
}

int main(void) {
  CHECK(lol_abi_version() == LOL_ABI_VERSION);
  CHECK(lol_max_threads() >= 1);
  CHECK(lol_has_cuda() == 0 || lol_has_cuda() == 1);
  FILL(q, 1);
  FILL(k, 2);
  FILL(v, 3);
  FILL(weight_q, 4);
  FILL(weight_k, 5);
  FILL(gate, 6);
  FILL(d_out, 7);
  a_thread_is_told_what_would_be_launched();
  CHECK(lol_cpu_isa_count() >= 1);
  for (int i = 0; i < lol_cpu_isa_count(); i++) {
    CHECK(lol_set_cpu_isa(lol_cpu_isa_name(i)) == LOL_OK);
    CHECK(strcmp(lol_cpu_isa(), lol_cpu_isa_name(i)) == 0);
    features_of_a_two_sided_softmax_sum_to_two();
    linear_attention_of_one_value_returns_it();
    steps_on_a_state_equal_one_call();
    a_window_over_everything_is_the_teacher();
    the_first_query_only_passes_its_value();
    printf("%s: ok\n", lol_cpu_isa());
  }
  return 0;
}
