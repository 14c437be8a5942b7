#include "check.h"

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <initializer_list>
#include <string>

namespace lol {
namespace {

thread_local char message[512] = "";

constexpr int64_t MAX_DIM = 256;  // D, V and f: what the kernels' tiles are laid out for

const char* name_of(int dtype) {
  static const char* names[] = {"float32", "bfloat16", "float16", "int32", "int64", "bool"};
  return dtype >= 0 && dtype < 6 ? names[dtype] : "unknown";
}

std::string shape_text(const int64_t* shape, int ndim) {
  std::string text = "[";
  for (int i = 0; i < ndim; i++) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

bool present(const lol_tensor& t) { return t.data || t.ndim; }

int64_t numel(const lol_tensor& t) {
  int64_t n = 1;
  for (int i = 0; i < t.ndim; i++) n *= t.shape[i];
  return n;
}

using Shape = std::initializer_list<int64_t>;

#define LOL_TRY(...)                               \
  do {                                             \
    if (int status = (__VA_ARGS__)) return status; \
  } while (0)

class Checker {
 public:
  explicit Checker(const char* op) : op_(op) {}

  int shape(const char* name, const lol_tensor& t, int dtype, Shape expected) const {
    bool same = t.ndim == (int)expected.size() && t.ndim <= 4;
    for (int i = 0; same && i < t.ndim; i++) same = t.shape[i] == expected.begin()[i];
    if (!same) {
      return fail("%s: %s has shape %s, needs %s", op_, name,
                  shape_text(t.shape, t.ndim <= 4 ? t.ndim : 0).c_str(),
                  shape_text(expected.begin(), (int)expected.size()).c_str());
    }
    if (t.dtype != dtype)
      return fail("%s: %s is %s, needs %s", op_, name, name_of(t.dtype), name_of(dtype));
    if (!t.data && numel(t) > 0) return fail("%s: %s has no data", op_, name);
    return LOL_OK;
  }

  // A sequence tensor: any strides, last dimension contiguous.
  int strided(const char* name, const lol_tensor& t, int dtype, Shape expected) const {
    LOL_TRY(shape(name, t, dtype, expected));
    if (t.shape[t.ndim - 1] > 1 && t.stride[t.ndim - 1] != 1) {
      return fail("%s: %s has stride %lld in its last dimension, which must be contiguous", op_,
                  name, (long long)t.stride[t.ndim - 1]);
    }
    return LOL_OK;
  }

  int contiguous(const char* name, const lol_tensor& t, int dtype, Shape expected) const {
    LOL_TRY(shape(name, t, dtype, expected));
    int64_t stride = 1;
    for (int i = t.ndim - 1; i >= 0; i--) {
      if (numel(t) > 0 && t.shape[i] > 1 && t.stride[i] != stride)
        return fail("%s: %s must be contiguous", op_, name);
      stride *= t.shape[i];
    }
    return LOL_OK;
  }

  int optional(const char* name, const lol_tensor& t, int dtype, Shape expected) const {
    return present(t) ? contiguous(name, t, dtype, expected) : LOL_OK;
  }

  int context(const lol_context& c) const {
    if (c.device < 0) return LOL_OK;
    fail("%s: device %d asked for, but this build has no CUDA kernels", op_, c.device);
    return LOL_EUNSUPPORTED;
  }

  int sequence(const char* name, const lol_tensor& t) const {
    if (t.ndim != 4)
      return fail("%s: %s has %d dimensions, needs 4: [B, H, T, D]", op_, name, t.ndim);
    if (t.dtype > LOL_F16 || t.dtype < 0) {
      return fail("%s: %s is %s, needs float32, bfloat16 or float16", op_, name, name_of(t.dtype));
    }
    if (t.shape[3] < 1 || t.shape[3] > MAX_DIM) {
      return fail("%s: %s has head dimension %lld, needs 1 to %lld", op_, name,
                  (long long)t.shape[3], (long long)MAX_DIM);
    }
    return strided(name, t, t.dtype, {t.shape[0], t.shape[1], t.shape[2], t.shape[3]});
  }

  // q, k and v of one attention: one dtype, one B and T, heads that divide.
  int qkv(const lol_tensor& q, const lol_tensor& k, const lol_tensor& v) const {
    LOL_TRY(sequence("q", q));
    LOL_TRY(sequence("k", k));
    LOL_TRY(sequence("v", v));
    const int64_t H = q.shape[1], Hk = k.shape[1];
    LOL_TRY(strided("k", k, q.dtype, {q.shape[0], Hk, q.shape[2], q.shape[3]}));
    LOL_TRY(strided("v", v, q.dtype, {q.shape[0], Hk, q.shape[2], v.shape[3]}));
    if (Hk < 1 || H % Hk) {
      return fail("%s: k has %lld heads, which does not divide q's %lld", op_, (long long)Hk,
                  (long long)H);
    }
    return LOL_OK;
  }

  int features(const char* name, const lol_features& f, int64_t D, int64_t H, int64_t Hk) const {
    const std::string weight = std::string(name) + ".weight", bias = std::string(name) + ".bias";
    if (f.weight.ndim != 3)
      return fail("%s: %s has %d dimensions, needs 3: [Hf, D, f]", op_, weight.c_str(),
                  f.weight.ndim);
    const int64_t Hf = f.weight.shape[0], width = f.weight.shape[2];
    if (Hf != H && Hf != Hk) {
      return fail("%s: %s has %lld heads, needs %lld or %lld", op_, weight.c_str(), (long long)Hf,
                  (long long)H, (long long)Hk);
    }
    if (width < 1 || width > MAX_DIM) {
      return fail("%s: %s has width %lld, needs 1 to %lld", op_, weight.c_str(), (long long)width,
                  (long long)MAX_DIM);
    }
    LOL_TRY(contiguous(weight.c_str(), f.weight, LOL_F32, {Hf, D, width}));
    LOL_TRY(optional(bias.c_str(), f.bias, LOL_F32, {Hf, width}));
    if (f.activation < LOL_SOFTMAX || f.activation > LOL_FAVOR) {
      return fail("%s: %s.activation is %d, needs 0 to %d", op_, name, f.activation, LOL_FAVOR);
    }
    if (f.two_sided && f.activation > LOL_EXP) {
      return fail("%s: %s.two_sided needs the activation softmax or exp", op_, name);
    }
    if (f.skip && width != D) {
      return fail("%s: %s.skip adds x, so f = %lld must equal D = %lld", op_, name,
                  (long long)width, (long long)D);
    }
    return LOL_OK;
  }

  int feature_pair(const lol_features& q, const lol_features& k, int64_t D, int64_t H,
                   int64_t Hk) const {
    LOL_TRY(features("feature_q", q, D, H, Hk));
    LOL_TRY(features("feature_k", k, D, H, Hk));
    if (q.weight.shape[2] != k.weight.shape[2]) {
      return fail("%s: feature_q has width %lld, feature_k %lld: they must agree", op_,
                  (long long)q.weight.shape[2], (long long)k.weight.shape[2]);
    }
    if (q.activation != k.activation || q.two_sided != k.two_sided || q.skip != k.skip ||
        q.eps != k.eps) {
      return fail("%s: feature_q and feature_k must agree in activation, two_sided, skip and eps",
                  op_);
    }
    return LOL_OK;
  }

  int gate(const lol_tensor& t, int64_t H) const {
    LOL_TRY(contiguous("gate", t, LOL_F32, {H}));
    for (int64_t h = 0; h < H; h++) {
      const float value = ((const float*)t.data)[h];
      if (!std::isfinite(value))
        return fail("%s: gate[%lld] is %f, needs a finite value", op_, (long long)h, value);
    }
    return LOL_OK;
  }

  int window(int64_t size, int32_t kind, int64_t sink) const {
    if (size < 0) return fail("%s: window is %lld, needs 0 or more", op_, (long long)size);
    if (sink < 0) return fail("%s: sink is %lld, needs 0 or more", op_, (long long)sink);
    if (kind != LOL_SLIDING && kind != LOL_TERRACE)
      return fail("%s: window_kind is %d, needs 0 or 1", op_, kind);
    return LOL_OK;
  }

  // cu_seqlens, key_padding_mask; `sequences` gets N.
  int layout(const lol_tensor& cu_seqlens, const lol_tensor& mask, int64_t B, int64_t T,
             int64_t* sequences) const {
    *sequences = B;
    if (present(mask)) {
      if (present(cu_seqlens))
        return fail("%s: cu_seqlens and key_padding_mask exclude each other", op_);
      return strided("key_padding_mask", mask, LOL_BOOL, {B, T});
    }
    if (!present(cu_seqlens)) return LOL_OK;
    if (B != 1)
      return fail("%s: cu_seqlens packs sequences into a batch of 1, got %lld", op_, (long long)B);
    const bool wide = cu_seqlens.dtype == LOL_I64;
    LOL_TRY(contiguous("cu_seqlens", cu_seqlens, wide ? LOL_I64 : LOL_I32, {numel(cu_seqlens)}));
    if (numel(cu_seqlens) < 1) return fail("%s: cu_seqlens is empty, needs [N + 1] offsets", op_);
    int64_t last = 0;
    for (int64_t i = 0; i < numel(cu_seqlens); i++) {
      const int64_t at =
          wide ? ((const int64_t*)cu_seqlens.data)[i] : ((const int32_t*)cu_seqlens.data)[i];
      if (at < last || at > T || (i == 0 && at != 0)) {
        return fail(
            "%s: cu_seqlens[%lld] is %lld, needs offsets from 0 up to at most %lld, in order", op_,
            (long long)i, (long long)at, (long long)T);
      }
      last = at;
    }
    *sequences = numel(cu_seqlens) - 1;
    return LOL_OK;
  }

  // Gradients of the parameters of a pair of maps.
  int feature_gradients(const lol_features& q, const lol_features& k, const lol_tensor& dweight_q,
                        const lol_tensor& dbias_q, const lol_tensor& dweight_k,
                        const lol_tensor& dbias_k) const {
    LOL_TRY(features_gradient("dweight_q", "dbias_q", q, dweight_q, dbias_q));
    return features_gradient("dweight_k", "dbias_k", k, dweight_k, dbias_k);
  }
  int features_gradient(const char* weight, const char* bias, const lol_features& f,
                        const lol_tensor& dweight, const lol_tensor& dbias) const {
    if (!present(f.weight)) return LOL_OK;
    const int64_t* s = f.weight.shape;
    LOL_TRY(contiguous(weight, dweight, LOL_F32, {s[0], s[1], s[2]}));
    return present(f.bias) ? contiguous(bias, dbias, LOL_F32, {s[0], s[2]}) : LOL_OK;
  }

  int qkv_gradients(const lol_tensor& q, const lol_tensor& k, const lol_tensor& v,
                    const lol_tensor& dq, const lol_tensor& dk, const lol_tensor& dv) const {
    LOL_TRY(like("dq", dq, q));
    LOL_TRY(like("dk", dk, k));
    return like("dv", dv, v);
  }
  int like(const char* name, const lol_tensor& t, const lol_tensor& other) const {
    return strided(name, t, other.dtype,
                   {other.shape[0], other.shape[1], other.shape[2], other.shape[3]});
  }

 private:
  const char* op_;
};

int64_t width_of(const lol_features& f, int64_t D) {
  return present(f.weight) ? f.weight.shape[2] * (f.two_sided ? 2 : 1) : D;
}

template <class Args>
int check_size(const char* op, const Args& a) {
  return a.struct_size == sizeof(Args) ? LOL_OK
                                       : fail("%s: struct_size is %zu, this library's is %zu", op,
                                              a.struct_size, sizeof(Args));
}

// What the hybrid and its transfer share: everything but the output.
int check_student(const Checker& c, const lol_hybrid_attention_args& a) {
  LOL_TRY(c.context(a.context));
  LOL_TRY(c.qkv(a.q, a.k, a.v));
  const int64_t B = a.q.shape[0], H = a.q.shape[1], T = a.q.shape[2];
  LOL_TRY(c.feature_pair(a.feature_q, a.feature_k, a.q.shape[3], H, a.k.shape[1]));
  LOL_TRY(c.gate(a.gate, H));
  LOL_TRY(c.window(a.window, a.window_kind, a.sink));
  int64_t sequences;
  LOL_TRY(c.layout(a.cu_seqlens, a.key_padding_mask, B, T, &sequences));
  LOL_TRY(c.contiguous("m", a.m, LOL_F32, {B, H, T}));
  return c.contiguous("den", a.den, LOL_F32, {B, H, T});
}

int check_forward(const Checker& c, const lol_linear_attention_args& a) {
  LOL_TRY(c.context(a.context));
  LOL_TRY(c.qkv(a.q, a.k, a.v));
  const int64_t B = a.q.shape[0], H = a.q.shape[1], T = a.q.shape[2], D = a.q.shape[3],
                V = a.v.shape[3];
  const bool maps = present(a.feature_q.weight) || present(a.feature_k.weight);
  if (maps) LOL_TRY(c.feature_pair(a.feature_q, a.feature_k, D, H, a.k.shape[1]));
  int64_t N;
  LOL_TRY(c.layout(a.cu_seqlens, a.key_padding_mask, B, T, &N));
  const int64_t Hs = maps ? a.feature_k.weight.shape[0] : a.k.shape[1],
                F = width_of(a.feature_k, D);
  if (present(a.kv0) != present(a.ksum0))
    return fail("linear_attention: kv0 and ksum0 come together or not at all");
  LOL_TRY(c.optional("kv0", a.kv0, LOL_F32, {N, Hs, F, V}));
  LOL_TRY(c.optional("ksum0", a.ksum0, LOL_F32, {N, Hs, F}));
  LOL_TRY(c.strided("o", a.o, a.q.dtype, {B, H, T, V}));
  return c.contiguous("den", a.den, LOL_F32, {B, H, T});
}

}  // namespace

int fail(const char* format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(message, sizeof(message), format, args);
  va_end(args);
  return LOL_EINVAL;
}

const char* last_error() { return message; }

int check(const lol_feature_map_args& a) {
  const Checker c("feature_map");
  LOL_TRY(check_size("feature_map", a));
  LOL_TRY(c.context(a.context));
  LOL_TRY(c.sequence("x", a.x));
  const int64_t* s = a.x.shape;
  if (a.features.weight.ndim == 3 && a.features.weight.shape[0] > 0 &&
      s[1] % a.features.weight.shape[0] == 0) {
    LOL_TRY(c.features("features", a.features, s[3], s[1], a.features.weight.shape[0]));
  } else {
    LOL_TRY(c.features("features", a.features, s[3], s[1], s[1]));
  }
  return c.strided("y", a.y, a.x.dtype, {s[0], s[1], s[2], width_of(a.features, s[3])});
}

int check(const lol_feature_map_backward_args& a) {
  const Checker c("feature_map_backward");
  LOL_TRY(check_size("feature_map_backward", a));
  lol_feature_map_args forward = {sizeof(forward), a.context, a.x, a.features, a.dy};
  LOL_TRY(check(forward));
  LOL_TRY(c.like("dx", a.dx, a.x));
  return c.features_gradient("dweight", "dbias", a.features, a.dweight, a.dbias);
}

int check(const lol_linear_attention_args& a) {
  const Checker c("linear_attention");
  LOL_TRY(check_size("linear_attention", a));
  LOL_TRY(check_forward(c, a));
  int64_t N;
  LOL_TRY(c.layout(a.cu_seqlens, a.key_padding_mask, a.q.shape[0], a.q.shape[2], &N));
  const int64_t Hs = present(a.feature_k.weight) ? a.feature_k.weight.shape[0] : a.k.shape[1];
  const int64_t F = width_of(a.feature_k, a.q.shape[3]);
  LOL_TRY(c.contiguous("kv", a.kv, LOL_F32, {N, Hs, F, a.v.shape[3]}));
  return c.contiguous("ksum", a.ksum, LOL_F32, {N, Hs, F});
}

int check(const lol_linear_attention_backward_args& a) {
  const Checker c("linear_attention_backward");
  LOL_TRY(check_size("linear_attention_backward", a));
  const lol_linear_attention_args& f = a.forward;
  LOL_TRY(check_forward(c, f));
  int64_t N;
  LOL_TRY(c.layout(f.cu_seqlens, f.key_padding_mask, f.q.shape[0], f.q.shape[2], &N));
  const int64_t Hs = present(f.feature_k.weight) ? f.feature_k.weight.shape[0] : f.k.shape[1];
  const int64_t F = width_of(f.feature_k, f.q.shape[3]), V = f.v.shape[3];
  LOL_TRY(c.like("do", a.do_, f.o));
  LOL_TRY(c.optional("dkv", a.dkv, LOL_F32, {N, Hs, F, V}));
  LOL_TRY(c.optional("dksum", a.dksum, LOL_F32, {N, Hs, F}));
  LOL_TRY(c.qkv_gradients(f.q, f.k, f.v, a.dq, a.dk, a.dv));
  LOL_TRY(c.feature_gradients(f.feature_q, f.feature_k, a.dweight_q, a.dbias_q, a.dweight_k,
                              a.dbias_k));
  if (!present(f.kv0)) return LOL_OK;
  LOL_TRY(c.contiguous("dkv0", a.dkv0, LOL_F32, {N, Hs, F, V}));
  return c.contiguous("dksum0", a.dksum0, LOL_F32, {N, Hs, F});
}

int check(const lol_hybrid_attention_args& a) {
  const Checker c("hybrid_attention");
  LOL_TRY(check_size("hybrid_attention", a));
  LOL_TRY(check_student(c, a));
  return c.strided("o", a.o, a.q.dtype, {a.q.shape[0], a.q.shape[1], a.q.shape[2], a.v.shape[3]});
}

int check(const lol_hybrid_attention_backward_args& a) {
  const Checker c("hybrid_attention_backward");
  LOL_TRY(check_size("hybrid_attention_backward", a));
  LOL_TRY(check(a.forward));
  const lol_hybrid_attention_args& f = a.forward;
  LOL_TRY(c.like("do", a.do_, f.o));
  LOL_TRY(c.qkv_gradients(f.q, f.k, f.v, a.dq, a.dk, a.dv));
  LOL_TRY(c.feature_gradients(f.feature_q, f.feature_k, a.dweight_q, a.dbias_q, a.dweight_k,
                              a.dbias_k));
  return c.contiguous("dgate", a.dgate, LOL_F32, {f.q.shape[1]});
}

int check(const lol_hybrid_attention_step_args& a) {
  const char* op = "hybrid_attention_step";
  const Checker c(op);
  LOL_TRY(check_size(op, a));
  LOL_TRY(c.context(a.context));
  LOL_TRY(c.qkv(a.q, a.k, a.v));
  const int64_t B = a.q.shape[0], H = a.q.shape[1], T = a.q.shape[2], D = a.q.shape[3],
                Hk = a.k.shape[1], V = a.v.shape[3];
  LOL_TRY(c.feature_pair(a.feature_q, a.feature_k, D, H, Hk));
  LOL_TRY(c.gate(a.gate, H));
  LOL_TRY(c.window(a.window, a.window_kind, 0));
  int64_t N;
  LOL_TRY(c.layout(a.cu_seqlens, a.key_padding_mask, B, T, &N));
  LOL_TRY(c.strided("o", a.o, a.q.dtype, {B, H, T, V}));

  const lol_state& s = a.state;
  const int64_t P = s.length.shape[0], Hs = a.feature_k.weight.shape[0],
                F = width_of(a.feature_k, D);
  const int64_t R = s.k_ring.shape[2], sinks = s.k_sink.shape[2];
  LOL_TRY(c.contiguous("state.length", s.length, LOL_I64, {P}));
  LOL_TRY(c.contiguous("state.folded", s.folded, LOL_I64, {P}));
  LOL_TRY(c.contiguous("state.kv", s.kv, LOL_F32, {P, Hs, F, V}));
  LOL_TRY(c.contiguous("state.ksum", s.ksum, LOL_F32, {P, Hs, F}));
  LOL_TRY(c.contiguous("state.k_ring", s.k_ring, a.q.dtype, {P, Hk, R, D}));
  LOL_TRY(c.contiguous("state.v_ring", s.v_ring, a.q.dtype, {P, Hk, R, V}));
  LOL_TRY(c.contiguous("state.k_sink", s.k_sink, a.q.dtype, {P, Hk, sinks, D}));
  LOL_TRY(c.contiguous("state.v_sink", s.v_sink, a.q.dtype, {P, Hk, sinks, V}));
  const int64_t span = a.window * (a.window_kind == LOL_TERRACE ? 2 : 1);
  if (R < span) {
    return fail("%s: state.k_ring holds %lld tokens, the window needs %lld", op, (long long)R,
                (long long)span);
  }
  const bool wide = a.state_indices.dtype == LOL_I64;
  if (!present(a.state_indices)) {
    if (P != N)
      return fail("%s: state holds %lld sequences, q has %lld", op, (long long)P, (long long)N);
    return LOL_OK;
  }
  LOL_TRY(c.contiguous("state_indices", a.state_indices, wide ? LOL_I64 : LOL_I32, {N}));
  for (int64_t i = 0; i < N; i++) {
    const auto slot = [&](int64_t j) {
      return wide ? ((const int64_t*)a.state_indices.data)[j]
                  : (int64_t)((const int32_t*)a.state_indices.data)[j];
    };
    if (slot(i) < 0 || slot(i) >= P) {
      return fail("%s: state_indices[%lld] is %lld, the pool has %lld slots", op, (long long)i,
                  (long long)slot(i), (long long)P);
    }
    for (int64_t j = 0; j < i; j++) {
      if (slot(j) == slot(i))
        return fail("%s: state_indices names slot %lld twice", op, (long long)slot(i));
    }
  }
  return LOL_OK;
}

static int check_transfer(const Checker& c, const lol_attention_transfer_args& a) {
  LOL_TRY(check_student(c, a.student));
  const int64_t B = a.student.q.shape[0], H = a.student.q.shape[1], T = a.student.q.shape[2],
                V = a.student.v.shape[3];
  LOL_TRY(c.contiguous("residual", a.residual, LOL_F32, {B, H, T, V}));
  LOL_TRY(c.contiguous("delta", a.delta, LOL_F32, {B, H, T}));
  return c.contiguous("lse", a.lse, LOL_F32, {B, H, T});
}

int check(const lol_attention_transfer_args& a) {
  const Checker c("attention_transfer");
  LOL_TRY(check_size("attention_transfer", a));
  LOL_TRY(check_transfer(c, a));
  const lol_tensor& q = a.student.q;
  LOL_TRY(c.strided("teacher", a.teacher, q.dtype,
                    {q.shape[0], q.shape[1], q.shape[2], a.student.v.shape[3]}));
  LOL_TRY(c.contiguous("mse", a.mse, LOL_F32, {}));
  return c.contiguous("xent", a.xent, LOL_F32, {});
}

int check(const lol_attention_transfer_backward_args& a) {
  const Checker c("attention_transfer_backward");
  LOL_TRY(check_size("attention_transfer_backward", a));
  LOL_TRY(check_transfer(c, a.forward));
  LOL_TRY(c.contiguous("d_mse", a.d_mse, LOL_F32, {}));
  LOL_TRY(c.contiguous("d_xent", a.d_xent, LOL_F32, {}));
  const lol_hybrid_attention_args& s = a.forward.student;
  LOL_TRY(c.feature_gradients(s.feature_q, s.feature_k, a.dweight_q, a.dbias_q, a.dweight_k,
                              a.dbias_k));
  return c.contiguous("dgate", a.dgate, LOL_F32, {s.q.shape[1]});
}

}  // namespace lol
