#include "check.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <vector>

#include "checker.h"

namespace lol {
namespace {

thread_local char message[2048] = "";  // the first errors of a compiler fit

// What the hybrid and its transfer share: everything but the output.
int check_student(const Checker& c, const lol_hybrid_attention_args& a) {
  LOL_TRY(c.qkv(a.q, a.k, a.v));
  const int64_t B = a.q.shape[0], H = a.q.shape[1], T = a.q.shape[2];
  LOL_TRY(c.maps(a.feature_q, a.feature_k, a.q.shape[3], H, a.k.shape[1]));
  LOL_TRY(c.gate(a.gate, H));
  LOL_TRY(c.scale(a.scale));
  LOL_TRY(c.window(a.window, a.window_kind, a.sink));
  int64_t sequences;
  LOL_TRY(c.layout(a.cu_seqlens, a.key_padding_mask, B, T, &sequences));
  LOL_TRY(c.contiguous("m", a.m, LOL_F32, {B, H, T}));
  return c.contiguous("den", a.den, LOL_F32, {B, H, T});
}

// Of its states.
struct StateSizes {
  int64_t N, Hs, F, V;
};

int check_forward(const Checker& c, const lol_linear_attention_args& a, StateSizes* states) {
  LOL_TRY(c.qkv(a.q, a.k, a.v));
  const int64_t B = a.q.shape[0], H = a.q.shape[1], T = a.q.shape[2], D = a.q.shape[3],
                V = a.v.shape[3];
  LOL_TRY(c.scale(a.scale));
  LOL_TRY(c.floor("eps", a.eps));
  const bool maps = present(a.feature_q.weight) || present(a.feature_k.weight);
  if (maps) {
    LOL_TRY(c.maps(a.feature_q, a.feature_k, D, H, a.k.shape[1]));
  } else {
    LOL_TRY(c.absent({"feature_q", ".bias"}, a.feature_q.bias, "a weight"));
    LOL_TRY(c.absent({"feature_k", ".bias"}, a.feature_k.bias, "a weight"));
  }
  int64_t N;
  LOL_TRY(c.layout(a.cu_seqlens, a.key_padding_mask, B, T, &N));
  const int64_t Hs = maps ? a.feature_k.weight.shape[0] : a.k.shape[1],
                F = out_features(a.feature_k, D);
  *states = {N, Hs, F, V};
  if (present(a.kv0) != present(a.ksum0))
    return fail("%s: kv0 and ksum0 come together or not at all", c.op());
  LOL_TRY(c.optional("kv0", a.kv0, LOL_F32, {N, Hs, F, V}));
  LOL_TRY(c.optional("ksum0", a.ksum0, LOL_F32, {N, Hs, F}));
  LOL_TRY(c.strided("o", a.o, a.q.dtype, {B, H, T, V}));
  return c.contiguous("den", a.den, LOL_F32, {B, H, T});
}

}  // namespace

int fail(const char* format, ...) {
  char text[sizeof(message)];  // an argument may be the last message
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof(text), format, args);
  va_end(args);
  strcpy(message, text);
  return LOL_EINVAL;
}

const char* last_error() { return message; }

static int check_map(const Checker& c, const lol_tensor& x, const lol_features& features) {
  LOL_TRY(c.sequence("x", x));
  LOL_TRY(c.map("features", features, x.shape[3]));
  const int64_t maps = features.weight.shape[0], H = x.shape[1];
  if (maps > 0 && H % maps == 0) return LOL_OK;
  return fail("%s: features.weight has %lld heads, needs a divisor of x's %lld", c.op(),
              (long long)maps, (long long)H);
}

int check(const lol_feature_map_args& a) {
  const Checker c("feature_map", a.context);
  LOL_TRY(c.size(a));
  LOL_TRY(c.on_cpu_or_cuda());
  LOL_TRY(check_map(c, a.x, a.features));
  const int64_t* s = a.x.shape;
  return c.output("y", a.y, a.x.dtype, {s[0], s[1], s[2], out_features(a.features, s[3])});
}

int check(const lol_feature_map_backward_args& a) {
  const Checker c("feature_map_backward", a.context);
  LOL_TRY(c.size(a));
  LOL_TRY(c.on_cpu());
  LOL_TRY(check_map(c, a.x, a.features));
  const int64_t* s = a.x.shape;
  LOL_TRY(c.strided("dy", a.dy, a.x.dtype, {s[0], s[1], s[2], out_features(a.features, s[3])}));
  LOL_TRY(c.gradient("dx", a.dx, a.x));
  return c.gradients_of_map("dweight", "dbias", a.features, a.dweight, a.dbias);
}

int check(const lol_linear_attention_args& a) {
  const Checker c("linear_attention", a.context);
  LOL_TRY(c.size(a));
  LOL_TRY(c.on_cpu_or_cuda());
  StateSizes s;
  LOL_TRY(check_forward(c, a, &s));
  LOL_TRY(c.output("o", a.o, a.q.dtype, {a.q.shape[0], a.q.shape[1], a.q.shape[2], s.V}));
  LOL_TRY(c.contiguous("kv", a.kv, LOL_F32, {s.N, s.Hs, s.F, s.V}));
  return c.contiguous("ksum", a.ksum, LOL_F32, {s.N, s.Hs, s.F});
}

int check(const lol_linear_attention_backward_args& a) {
  const Checker c("linear_attention_backward", a.forward.context);
  LOL_TRY(c.size(a));
  LOL_TRY(c.on_cpu());
  const lol_linear_attention_args& f = a.forward;
  LOL_TRY(c.size(f, "forward."));
  StateSizes s;
  LOL_TRY(check_forward(c, f, &s));
  LOL_TRY(c.like("do", a.do_, f.o));
  LOL_TRY(c.optional("dkv", a.dkv, LOL_F32, {s.N, s.Hs, s.F, s.V}));
  LOL_TRY(c.optional("dksum", a.dksum, LOL_F32, {s.N, s.Hs, s.F}));
  LOL_TRY(c.qkv_gradients(f.q, f.k, f.v, a.dq, a.dk, a.dv));
  LOL_TRY(c.gradients_of_maps(f.feature_q, f.feature_k, a.dweight_q, a.dbias_q, a.dweight_k,
                              a.dbias_k));
  if (!present(f.kv0)) {
    LOL_TRY(c.absent("dkv0", a.dkv0, "kv0"));
    return c.absent("dksum0", a.dksum0, "ksum0");
  }
  LOL_TRY(c.contiguous("dkv0", a.dkv0, LOL_F32, {s.N, s.Hs, s.F, s.V}));
  return c.contiguous("dksum0", a.dksum0, LOL_F32, {s.N, s.Hs, s.F});
}

int check(const lol_hybrid_attention_args& a) {
  const Checker c("hybrid_attention", a.context);
  LOL_TRY(c.size(a));
  LOL_TRY(c.on_cpu_or_cuda());
  LOL_TRY(check_student(c, a));
  return c.output("o", a.o, a.q.dtype, {a.q.shape[0], a.q.shape[1], a.q.shape[2], a.v.shape[3]});
}

int check(const lol_hybrid_attention_backward_args& a) {
  const Checker c("hybrid_attention_backward", a.forward.context);
  LOL_TRY(c.size(a));
  LOL_TRY(c.on_cpu());
  const lol_hybrid_attention_args& f = a.forward;
  LOL_TRY(c.size(f, "forward."));
  LOL_TRY(check_student(c, f));
  LOL_TRY(c.strided("o", f.o, f.q.dtype, {f.q.shape[0], f.q.shape[1], f.q.shape[2], f.v.shape[3]}));
  LOL_TRY(c.like("do", a.do_, f.o));
  LOL_TRY(c.qkv_gradients(f.q, f.k, f.v, a.dq, a.dk, a.dv));
  LOL_TRY(c.gradients_of_maps(f.feature_q, f.feature_k, a.dweight_q, a.dbias_q, a.dweight_k,
                              a.dbias_k));
  return c.contiguous("dgate", a.dgate, LOL_F32, {f.q.shape[1]});
}

// The ring is long enough for the window, and for what `lazy` leaves in it.
static int check_ring(const Checker& c, const lol_hybrid_attention_step_args& a) {
  const int64_t R = a.state.k_ring.shape[2];
  const int64_t times = window_span(1, a.window_kind);  // a window may be too long to double
  if (a.window > R / times) {
    return fail("%s: state.k_ring has %lld slots, a %s window of %lld needs at least %llu", c.op(),
                (long long)R, times == 2 ? "terrace" : "sliding", (long long)a.window,
                (unsigned long long)a.window * times);
  }
  const int64_t slack = R - a.window * times;
  if (a.lazy >= 0 && a.lazy <= slack) return LOL_OK;
  return fail("%s: lazy is %lld, needs 0 up to the ring's slack of %lld", c.op(), (long long)a.lazy,
              (long long)slack);
}

// The counters of a slot say where rows are read and written. A state that holds keys of the next
// query's window would count them twice.
static int check_counters(const Checker& c, const lol_hybrid_attention_step_args& a, int64_t slot) {
  const int64_t R = a.state.k_ring.shape[2];
  const int64_t length = ((const int64_t*)a.state.length.data)[slot];
  const int64_t folded = ((const int64_t*)a.state.folded.data)[slot];
  const auto oldest_kept = [&] {
    return a.window > 0 ? window_start(a.window, a.window_kind, length) : length;
  };
  if (length >= 0 && length < INT64_MAX / 2 && folded >= 0 && folded <= oldest_kept() &&
      length - folded <= R)
    return LOL_OK;
  return fail(
      "%s: state.length[%lld] is %lld and state.folded[%lld] %lld, needs 0 <= folded, at most "
      "where the next token's window starts, and the rest in the ring of %lld",
      c.op(), (long long)slot, (long long)length, (long long)slot, (long long)folded, (long long)R);
}

// N slots of the pool, each named once, and their counters.
static int check_slots(const Checker& c, const lol_hybrid_attention_step_args& a, int64_t N) {
  constexpr int64_t FEW = 64;  // pairs of so many are compared, which takes no memory from the heap
  const int64_t P = a.state.kv.shape[0];
  std::vector<bool> taken(N > FEW ? P : 0);
  const auto slot = [&](int64_t i) { return index_at(a.state_indices, i); };
  for (int64_t i = 0; i < N; i++) {
    if (slot(i) < 0 || slot(i) >= P) {
      return fail("%s: state_indices[%lld] is %lld, the pool has %lld slots", c.op(), (long long)i,
                  (long long)slot(i), (long long)P);
    }
    bool twice = false;
    if (N > FEW) {
      twice = taken[slot(i)];
      taken[slot(i)] = true;
    }
    for (int64_t j = 0; N <= FEW && j < i; j++) twice = twice || slot(j) == slot(i);
    if (twice) return fail("%s: state_indices names slot %lld twice", c.op(), (long long)slot(i));
    LOL_TRY(check_counters(c, a, slot(i)));
  }
  return LOL_OK;
}

int check(const lol_hybrid_attention_step_args& a) {
  const Checker c("hybrid_attention_step", a.context);
  LOL_TRY(c.size(a));
  LOL_TRY(c.on_cpu_or_cuda());
  LOL_TRY(c.qkv(a.q, a.k, a.v));
  const int64_t B = a.q.shape[0], H = a.q.shape[1], T = a.q.shape[2], D = a.q.shape[3],
                Hk = a.k.shape[1], V = a.v.shape[3];
  LOL_TRY(c.maps(a.feature_q, a.feature_k, D, H, Hk));
  LOL_TRY(c.gate(a.gate, H));
  LOL_TRY(c.scale(a.scale));
  LOL_TRY(c.window(a.window, a.window_kind, 0));
  int64_t N;
  LOL_TRY(c.layout(a.cu_seqlens, a.key_padding_mask, B, T, &N));
  LOL_TRY(c.output("o", a.o, a.q.dtype, {B, H, T, V}));

  const lol_state& s = a.state;
  const int64_t P = s.kv.shape[0], Hs = a.feature_k.weight.shape[0],
                F = out_features(a.feature_k, D);
  const int64_t R = s.k_ring.shape[2], sinks = s.k_sink.shape[2];
  LOL_TRY(c.contiguous("state.kv", s.kv, LOL_F32, {P, Hs, F, V}));
  LOL_TRY(c.contiguous("state.length", s.length, LOL_I64, {P}));
  LOL_TRY(c.contiguous("state.folded", s.folded, LOL_I64, {P}));
  LOL_TRY(c.contiguous("state.ksum", s.ksum, LOL_F32, {P, Hs, F}));
  LOL_TRY(c.contiguous("state.k_ring", s.k_ring, a.q.dtype, {P, Hk, R, D}));
  LOL_TRY(c.contiguous("state.v_ring", s.v_ring, a.q.dtype, {P, Hk, R, V}));
  LOL_TRY(c.contiguous("state.k_sink", s.k_sink, a.q.dtype, {P, Hk, sinks, D}));
  LOL_TRY(c.contiguous("state.v_sink", s.v_sink, a.q.dtype, {P, Hk, sinks, V}));
  LOL_TRY(check_ring(c, a));
  if (!present(a.state_indices)) {
    if (P != N)
      return fail("%s: state holds %lld sequences, q has %lld", c.op(), (long long)P, (long long)N);
    for (int64_t i = 0; !c.on_device() && i < N; i++) LOL_TRY(check_counters(c, a, i));
    return LOL_OK;
  }
  LOL_TRY(c.indices("state_indices", a.state_indices, N));
  return c.on_device() ? LOL_OK : check_slots(c, a, N);
}

static int check_transfer(const Checker& c, const lol_attention_transfer_args& a) {
  LOL_TRY(c.on_cpu());
  LOL_TRY(check_student(c, a.student));
  const int64_t B = a.student.q.shape[0], H = a.student.q.shape[1], T = a.student.q.shape[2],
                V = a.student.v.shape[3];
  LOL_TRY(c.contiguous("residual", a.residual, LOL_F32, {B, H, T, V}));
  LOL_TRY(c.contiguous("delta", a.delta, LOL_F32, {B, H, T}));
  return c.contiguous("lse", a.lse, LOL_F32, {B, H, T});
}

int check(const lol_attention_transfer_args& a) {
  const Checker c("attention_transfer", a.student.context);
  LOL_TRY(c.size(a));
  LOL_TRY(c.size(a.student, "student."));
  LOL_TRY(check_transfer(c, a));
  const lol_tensor& q = a.student.q;
  LOL_TRY(c.output("teacher", a.teacher, q.dtype,
                   {q.shape[0], q.shape[1], q.shape[2], a.student.v.shape[3]}));
  LOL_TRY(c.contiguous("mse", a.mse, LOL_F32, {}));
  return c.contiguous("xent", a.xent, LOL_F32, {});
}

int check(const lol_attention_transfer_backward_args& a) {
  const Checker c("attention_transfer_backward", a.forward.student.context);
  LOL_TRY(c.size(a));
  LOL_TRY(c.size(a.forward, "forward."));
  LOL_TRY(c.size(a.forward.student, "forward.student."));
  LOL_TRY(check_transfer(c, a.forward));
  LOL_TRY(c.contiguous("d_mse", a.d_mse, LOL_F32, {}));
  LOL_TRY(c.contiguous("d_xent", a.d_xent, LOL_F32, {}));
  const lol_hybrid_attention_args& s = a.forward.student;
  LOL_TRY(c.gradients_of_maps(s.feature_q, s.feature_k, a.dweight_q, a.dbias_q, a.dweight_k,
                              a.dbias_k));
  return c.contiguous("dgate", a.dgate, LOL_F32, {s.q.shape[1]});
}

}  // namespace lol
