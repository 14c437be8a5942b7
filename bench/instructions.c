/* One call of an operator, between two marks: the driver of instructions.py and ports.py.
 *
 *     instructions OP BACKWARD DTYPE B H Hk T D V f window
 *
 * prints how often the call took memory from the heap. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lolcats_ops/lolcats_ops.h"
#ifdef TRACED /* by trace.c */
#define MARK __asm__ volatile("int3")
#else
#include <valgrind/callgrind.h>
#define MARK CALLGRIND_TOGGLE_COLLECT
#endif

/* The library's calls find these before the C library's. */
static int allocations;
void* __libc_malloc(size_t size);
void* __libc_calloc(size_t count, size_t size);
void* __libc_memalign(size_t alignment, size_t size);

void* malloc(size_t size) {
  allocations++;
  return __libc_malloc(size);
}
void* calloc(size_t count, size_t size) {
  allocations++;
  return __libc_calloc(count, size);
}
int posix_memalign(void** out, size_t alignment, size_t size) {
  allocations++;
  *out = __libc_memalign(alignment, size);
  return *out ? 0 : ENOMEM;
}

static int dtype;
static unsigned seed = 1;

/* A contiguous tensor of values in [-1, 1). */
static lol_tensor filled(int type, int ndim, const int64_t* shape) {
  lol_tensor t = {NULL, type, ndim, {0}, {0}};
  int64_t size = 1;
  for (int i = ndim - 1; i >= 0; i--) {
    t.shape[i] = shape[i];
    t.stride[i] = size;
    size *= shape[i];
  }
  const size_t item = type == LOL_I64 ? 8 : type == LOL_F32 ? 4 : 2;
  t.data = calloc((size_t)size + 1, item);
  for (int64_t i = 0; i < size && type != LOL_I64; i++) {
    seed = seed * 1664525u + 1013904223u;
    const float x = (float)(seed >> 8) / (1 << 23) - 1;
    if (type == LOL_F32)
      ((float*)t.data)[i] = x;
    else /* bf16: the upper half, on a little-endian machine */
      memcpy((char*)t.data + 2 * i, (const char*)&x + 2, 2);
  }
  return t;
}
#define SHAPE(...) \
  (int)(sizeof((int64_t[]){__VA_ARGS__}) / 8), (int64_t[]) { __VA_ARGS__ }
#define ROWS(...) filled(dtype, SHAPE(__VA_ARGS__))
#define FLOATS(...) filled(LOL_F32, SHAPE(__VA_ARGS__))

static void check(int status) {
  if (status == LOL_OK) return;
  fprintf(stderr, "%s\n", lol_last_error());
  exit(1);
}
/* The first call is not counted: it loads symbols and starts the threads' runtime. */
#define MEASURE(call)            \
  do {                           \
    check(call);                 \
    allocations = 0;             \
    MARK;                        \
    const int status = call;     \
    MARK;                        \
    check(status);               \
    printf("%d\n", allocations); \
    return 0;                    \
  } while (0)

int main(int argc, char** argv) {
  if (argc != 12) return 2;
  const char* op = argv[1];
  const int backward = atoi(argv[2]);
  dtype = strcmp(argv[3], "bfloat16") ? LOL_F32 : LOL_BF16;
  int64_t n[8];
  for (int i = 0; i < 8; i++) n[i] = atoll(argv[4 + i]);
  const int64_t B = n[0], H = n[1], Hk = n[2], T = n[3], D = n[4], V = n[5], f = n[6], w = n[7];
  const int64_t F = f ? 2 * f : D;

  lol_features feature_q = {0};
  feature_q.activation = LOL_SOFTMAX;
  feature_q.two_sided = 1;
  feature_q.eps = 1e-12;
  lol_features feature_k = feature_q;
  lol_tensor dweight_q = {0}, dweight_k = {0};
  if (f) {
    feature_q.weight = FLOATS(H, D, f);
    feature_k.weight = FLOATS(H, D, f);
    dweight_q = FLOATS(H, D, f);
    dweight_k = FLOATS(H, D, f);
  }
  const lol_tensor q = ROWS(B, H, T, D), k = ROWS(B, Hk, T, D), v = ROWS(B, Hk, T, V);
  const lol_tensor dq = ROWS(B, H, T, D), dk = ROWS(B, Hk, T, D), dv = ROWS(B, Hk, T, V);
  const lol_tensor o = ROWS(B, H, T, V), d_o = ROWS(B, H, T, V), den = FLOATS(B, H, T);
  const lol_tensor gate = FLOATS(H), dgate = FLOATS(H);
  const lol_context cpu = {-1, NULL};

  if (!strcmp(op, "feature_map")) {
    lol_feature_map_args args = {sizeof args, cpu, q, feature_q, ROWS(B, H, T, F)};
    lol_feature_map_backward_args grad = {0};
    grad.struct_size = sizeof grad;
    grad.context = cpu;
    grad.dy = args.y;
    grad.x = q;
    grad.features = feature_q;
    grad.dx = dq;
    grad.dweight = dweight_q;
    if (backward) MEASURE(lol_feature_map_backward(&grad));
    MEASURE(lol_feature_map(&args));
  }
  if (!strcmp(op, "linear_attention")) {
    lol_linear_attention_args args = {0};
    args.struct_size = sizeof args;
    args.context = cpu;
    args.q = q, args.k = k, args.v = v;
    args.feature_q = feature_q, args.feature_k = feature_k;
    args.scale = 1, args.normalize = 1, args.eps = 1e-12;
    args.o = o, args.den = den;
    args.kv = FLOATS(B, H, F, V), args.ksum = FLOATS(B, H, F);
    MEASURE(lol_linear_attention(&args));
  }
  if (!strcmp(op, "step")) {
    lol_hybrid_attention_step_args args = {0};
    args.struct_size = sizeof args;
    args.context = cpu;
    args.q = q, args.k = k, args.v = v;
    args.feature_q = feature_q, args.feature_k = feature_k, args.gate = gate;
    args.window = w, args.window_kind = LOL_SLIDING, args.scale = 0.125;
    args.state.kv = FLOATS(B, H, F, V), args.state.ksum = FLOATS(B, H, F);
    args.state.k_ring = ROWS(B, Hk, w, D), args.state.v_ring = ROWS(B, Hk, w, V);
    args.state.k_sink = ROWS(B, Hk, 0, D), args.state.v_sink = ROWS(B, Hk, 0, V);
    args.state.length = filled(LOL_I64, SHAPE(B)), args.state.folded = filled(LOL_I64, SHAPE(B));
    for (int64_t b = 0; b < B; b++) {
      ((int64_t*)args.state.length.data)[b] = 4 * w;
      ((int64_t*)args.state.folded.data)[b] = 3 * w;
    }
    args.o = o;
    MEASURE(lol_hybrid_attention_step(&args));
  }

  lol_hybrid_attention_args hybrid = {0};
  hybrid.struct_size = sizeof hybrid;
  hybrid.context = cpu;
  hybrid.q = q, hybrid.k = k, hybrid.v = v;
  hybrid.feature_q = feature_q, hybrid.feature_k = feature_k, hybrid.gate = gate;
  hybrid.window = w, hybrid.window_kind = LOL_SLIDING, hybrid.scale = 0.125;
  hybrid.o = o, hybrid.m = FLOATS(B, H, T), hybrid.den = den;
  if (!strcmp(op, "hybrid_attention")) {
    if (!backward) MEASURE(lol_hybrid_attention(&hybrid));
    check(lol_hybrid_attention(&hybrid));
    lol_hybrid_attention_backward_args grad = {0};
    grad.struct_size = sizeof grad;
    grad.forward = hybrid;
    grad.do_ = d_o;
    grad.dq = dq, grad.dk = dk, grad.dv = dv;
    grad.dweight_q = dweight_q, grad.dweight_k = dweight_k, grad.dgate = dgate;
    MEASURE(lol_hybrid_attention_backward(&grad));
  }
  if (!strcmp(op, "attention_transfer")) {
    static float mse, xent, one = 1;
    lol_attention_transfer_args args = {0};
    args.struct_size = sizeof args;
    args.student = hybrid;
    args.teacher = d_o;
    args.mse = args.xent = filled(LOL_F32, 0, NULL);
    args.mse.data = &mse, args.xent.data = &xent;
    args.residual = FLOATS(B, H, T, V), args.delta = FLOATS(B, H, T), args.lse = FLOATS(B, H, T);
    if (!backward) MEASURE(lol_attention_transfer(&args));
    check(lol_attention_transfer(&args));
    lol_attention_transfer_backward_args grad = {0};
    grad.struct_size = sizeof grad;
    grad.forward = args;
    grad.d_mse = grad.d_xent = args.mse;
    grad.d_mse.data = grad.d_xent.data = &one;
    grad.dweight_q = dweight_q, grad.dweight_k = dweight_k, grad.dgate = dgate;
    MEASURE(lol_attention_transfer_backward(&grad));
  }
  fprintf(stderr, "no operator %s\n", op);
  return 2;
}
