// What the checks of single ops are made of. Each method returns LOL_OK, or sets the message and
// returns the error.
#pragma once
#include <cmath>
#include <initializer_list>
#include <string>

#include "arguments.h"
#include "check.h"
#include "cuda/launch.h"

namespace lol {

constexpr int64_t MAX_DIM = 256;  // D, V and f: what the kernels' tiles are laid out for
// What CUDA kernels count in 32 bits (tokens, heads, sequences, slots), with room for a tile more.
constexpr int64_t MAX_SIZE_ON_DEVICE = 1 << 30;

inline std::string name_of(int dtype) {
  static const char* names[] = {"float32", "bfloat16", "float16", "int32", "int64", "bool"};
  if (dtype >= 0 && dtype < 6) return names[dtype];
  return "of dtype code " + std::to_string(dtype);
}
inline uintptr_t size_of(int dtype) {
  static const uint8_t sizes[] = {4, 2, 2, 4, 8, 1};
  return sizes[dtype];
}

inline std::string shape_text(const int64_t* shape, int ndim) {
  std::string text = "[";
  for (int i = 0; i < ndim; i++) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// Whether its sizes are such that its bytes can be counted.
inline bool countable(const lol_tensor& t) {
  int64_t bytes = 8;
  for (int i = 0; i < t.ndim; i++) {
    if (t.shape[i] < 0 || __builtin_mul_overflow(bytes, t.shape[i], &bytes)) return false;
  }
  return true;
}
inline int64_t numel(const lol_tensor& t) {
  int64_t n = 1;
  for (int i = 0; i < t.ndim; i++) {
    if (t.shape[i] == 0) return 0;  // whatever the others: their product may be no number
  }
  for (int i = 0; i < t.ndim; i++) n *= t.shape[i];
  return n;
}

using Shape = std::initializer_list<int64_t>;

// An argument, or a member of one: messages put them together, so that no check takes memory.
struct Name {
  const char* argument;
  const char* member;
  Name(const char* of, const char* part = "") : argument(of), member(part) {}
};

#define LOL_TRY(...)                               \
  do {                                             \
    if (int status = (__VA_ARGS__)) return status; \
  } while (0)

class Checker {
 public:
  Checker(const char* op, const lol_context& context) : op_(op), context_(context) {}

  const char* op() const { return op_; }

  // What the caller was compiled with is what this library was; `member` of its arguments.
  template <class Args>
  int size(const Args& a, const char* member = "") const {
    if (a.struct_size == sizeof(Args)) return LOL_OK;
    return fail("%s: %sstruct_size is %zu, this library's is %zu", op_, member, a.struct_size,
                sizeof(Args));
  }

  int shape(Name name, const lol_tensor& t, int dtype, Shape expected) const {
    const int ndim = (int)expected.size();
    if (!present(t) && ndim > 0) {
      return fail("%s: %s%s is absent, needs %s", op_, name.argument, name.member,
                  shape_text(expected.begin(), ndim).c_str());
    }
    if (t.ndim != ndim) {
      return fail("%s: %s%s has %d dimensions, needs %s", op_, name.argument, name.member, t.ndim,
                  shape_text(expected.begin(), ndim).c_str());
    }
    bool same = true;
    for (int i = 0; i < ndim; i++) same = same && t.shape[i] == expected.begin()[i];
    if (!same) {
      return fail("%s: %s%s has shape %s, needs %s", op_, name.argument, name.member,
                  shape_text(t.shape, ndim).c_str(), shape_text(expected.begin(), ndim).c_str());
    }
    if (!countable(t)) {
      return fail("%s: %s%s has shape %s, which no memory holds", op_, name.argument, name.member,
                  shape_text(t.shape, t.ndim).c_str());
    }
    for (int i = 0; on_device() && i < ndim; i++) {
      if (t.shape[i] > MAX_SIZE_ON_DEVICE) {
        return fail("%s: %s%s has shape %s, of which a GPU takes no size above %lld", op_,
                    name.argument, name.member, shape_text(t.shape, ndim).c_str(),
                    (long long)MAX_SIZE_ON_DEVICE);
      }
    }
    if (t.dtype != dtype)
      return fail("%s: %s%s is %s, needs %s", op_, name.argument, name.member,
                  name_of(t.dtype).c_str(), name_of(dtype).c_str());
    if (!t.data && numel(t) > 0)
      return fail("%s: %s%s has no data", op_, name.argument, name.member);
    if ((uintptr_t)t.data % size_of(dtype)) {
      return fail("%s: %s%s is %s at an address that is no multiple of %d", op_, name.argument,
                  name.member, name_of(dtype).c_str(), (int)size_of(dtype));
    }
    return LOL_OK;
  }

  // A sequence tensor: any strides, last dimension contiguous.
  int strided(Name name, const lol_tensor& t, int dtype, Shape expected) const {
    LOL_TRY(shape(name, t, dtype, expected));
    if (t.shape[t.ndim - 1] > 1 && t.stride[t.ndim - 1] != 1 && numel(t) > 0) {
      return fail("%s: %s%s has stride %lld in its last dimension, which must be contiguous", op_,
                  name.argument, name.member, (long long)t.stride[t.ndim - 1]);
    }
    return LOL_OK;
  }

  // One that is written: no two of its elements may be one, as those of a broadcast are.
  int output(Name name, const lol_tensor& t, int dtype, Shape expected) const {
    LOL_TRY(strided(name, t, dtype, expected));
    for (int i = 0; i < t.ndim; i++) {
      if (t.shape[i] > 1 && t.stride[i] == 0 && numel(t) > 0) {
        return fail("%s: %s%s is written and has stride 0 in dimension %d", op_, name.argument,
                    name.member, i);
      }
    }
    return LOL_OK;
  }

  int contiguous(Name name, const lol_tensor& t, int dtype, Shape expected) const {
    LOL_TRY(shape(name, t, dtype, expected));
    if (numel(t) == 0) return LOL_OK;
    int64_t stride = 1;
    for (int i = t.ndim - 1; i >= 0; i--) {
      if (t.shape[i] > 1 && t.stride[i] != stride)
        return fail("%s: %s%s must be contiguous", op_, name.argument, name.member);
      stride *= t.shape[i];
    }
    return LOL_OK;
  }

  // Offsets or slots.
  int indices(Name name, const lol_tensor& t, int64_t count) const {
    if (t.dtype != LOL_I32 && t.dtype != LOL_I64) {
      return fail("%s: %s%s is %s, needs int32 or int64", op_, name.argument, name.member,
                  name_of(t.dtype).c_str());
    }
    return contiguous(name, t, t.dtype, {count});
  }

  // An output that there is only beside an input.
  int absent(Name name, const lol_tensor& t, Name without) const {
    if (!present(t)) return LOL_OK;
    return fail("%s: %s%s is given without %s%s", op_, name.argument, name.member, without.argument,
                without.member);
  }
  int optional(Name name, const lol_tensor& t, int dtype, Shape expected) const {
    return present(t) ? contiguous(name, t, dtype, expected) : LOL_OK;
  }

  // Of operators that have no CUDA kernel, and of those that have one.
  int on_cpu() const {
    if (!on_device()) return LOL_OK;
    fail("%s: device %d asked for, but there is no CUDA kernel: use the Triton kernels", op_,
         context_.device);
    return LOL_EUNSUPPORTED;
  }
  int on_cpu_or_cuda() const {
    if (!on_device() || cuda::can_launch()) return LOL_OK;
    fail(
        "%s: device %d asked for, but this build has no CUDA kernels: build with "
        "-DLOLCATS_CUDA=ON, or set a launcher that compiles them (lol_set_cuda_launcher; in "
        "Python, lolcats_ops.cupy.install_launcher); the CPU is device -1",
        op_, context_.device);
    return LOL_EUNSUPPORTED;
  }
  // Whether the tensors are where the host cannot read them: then it trusts their values.
  bool on_device() const { return context_.device >= 0; }

  int sequence(const char* name, const lol_tensor& t) const {
    if (!present(t)) return fail("%s: %s is absent, needs [B, H, T, D]", op_, name);
    if (t.ndim != 4)
      return fail("%s: %s has %d dimensions, needs 4: [B, H, T, D]", op_, name, t.ndim);
    if (t.dtype > LOL_F16 || t.dtype < 0) {
      return fail("%s: %s is %s, needs float32, bfloat16 or float16", op_, name,
                  name_of(t.dtype).c_str());
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
    if (H < 1) return fail("%s: q has %lld heads, needs 1 or more", op_, (long long)H);
    if (Hk < 1 || H % Hk) {
      return fail("%s: k has %lld heads, which does not divide q's %lld", op_, (long long)Hk,
                  (long long)H);
    }
    LOL_TRY(strided("k", k, q.dtype, {q.shape[0], Hk, q.shape[2], q.shape[3]}));
    return strided("v", v, q.dtype, {q.shape[0], Hk, q.shape[2], v.shape[3]});
  }

  // A map of the heads of q or of k.
  int attention_map(const char* name, const lol_features& f, int64_t D, int64_t H,
                    int64_t Hk) const {
    const int64_t Hf = f.weight.shape[0];
    if (f.weight.ndim == 3 && (Hf < 1 || (Hf != H && Hf != Hk))) {
      return fail("%s: %s.weight has %lld heads, needs q's %lld or k's %lld", op_, name,
                  (long long)Hf, (long long)H, (long long)Hk);
    }
    return map(name, f, D);
  }
  // A map of any number of heads.
  int map(const char* name, const lol_features& f, int64_t D) const {
    if (!present(f.weight)) return fail("%s: %s.weight is absent, needs [Hf, D, f]", op_, name);
    if (f.weight.ndim != 3)
      return fail("%s: %s.weight has %d dimensions, needs 3: [Hf, D, f]", op_, name, f.weight.ndim);
    const int64_t Hf = f.weight.shape[0], width = f.weight.shape[2];
    if (width < 1 || width > MAX_DIM) {
      return fail("%s: %s.weight has width %lld, needs 1 to %lld", op_, name, (long long)width,
                  (long long)MAX_DIM);
    }
    LOL_TRY(contiguous({name, ".weight"}, f.weight, LOL_F32, {Hf, D, width}));
    LOL_TRY(optional({name, ".bias"}, f.bias, LOL_F32, {Hf, width}));
    if (f.activation < LOL_SOFTMAX || f.activation > LOL_FAVOR) {
      return fail("%s: %s.activation is %d, needs 0 to %d", op_, name, f.activation, LOL_FAVOR);
    }
    if (f.two_sided && f.activation > LOL_EXP) {
      return fail("%s: %s.two_sided needs the activation softmax or exp", op_, name);
    }
    if (f.activation == LOL_FAVOR && (f.skip || present(f.bias)))
      return fail("%s: %s.activation favor takes neither bias nor skip", op_, name);
    LOL_TRY(floor({name, ".eps"}, f.eps));
    if (f.skip && width != D) {
      return fail("%s: %s.skip adds x, so f = %lld must equal D = %lld", op_, name,
                  (long long)width, (long long)D);
    }
    return LOL_OK;
  }

  // The maps of q and k, which are of one kind.
  int maps(const lol_features& q, const lol_features& k, int64_t D, int64_t H, int64_t Hk) const {
    LOL_TRY(attention_map("feature_q", q, D, H, Hk));
    LOL_TRY(attention_map("feature_k", k, D, H, Hk));
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
    for (int64_t h = 0; !on_device() && h < H; h++) {
      const float value = ((const float*)t.data)[h];
      if (!std::isfinite(value))
        return fail("%s: gate[%lld] is %f, needs a finite value", op_, (long long)h, value);
    }
    return LOL_OK;
  }

  int scale(double value) const {
    if (std::isfinite((float)value)) return LOL_OK;
    return fail("%s: scale is %g, needs a finite number of float32", op_, value);
  }
  int floor(Name name, double value) const {
    if (value >= 0 && std::isfinite((float)value)) return LOL_OK;
    return fail("%s: %s%s is %g, needs a finite number of float32, >= 0", op_, name.argument,
                name.member, value);
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
      if (T > INT32_MAX) {  // rows of real tokens are counted in 32 bits
        return fail("%s: key_padding_mask has %lld tokens, needs fewer than 2^31", op_,
                    (long long)T);
      }
      return strided("key_padding_mask", mask, LOL_BOOL, {B, T});
    }
    if (!present(cu_seqlens)) return LOL_OK;
    if (B != 1)
      return fail("%s: cu_seqlens packs sequences into a batch of 1, got %lld", op_, (long long)B);
    if (cu_seqlens.ndim != 1)
      return fail("%s: cu_seqlens has %d dimensions, needs 1", op_, cu_seqlens.ndim);
    LOL_TRY(indices("cu_seqlens", cu_seqlens, cu_seqlens.shape[0]));
    if (numel(cu_seqlens) < 1) return fail("%s: cu_seqlens is empty, needs [N + 1] offsets", op_);
    int64_t last = 0;
    for (int64_t i = 0; !on_device() && i < numel(cu_seqlens); i++) {
      const int64_t at = index_at(cu_seqlens, i);
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

  // Gradients of the parameters of both maps, and of one.
  int gradients_of_maps(const lol_features& q, const lol_features& k, const lol_tensor& dweight_q,
                        const lol_tensor& dbias_q, const lol_tensor& dweight_k,
                        const lol_tensor& dbias_k) const {
    LOL_TRY(gradients_of_map("dweight_q", "dbias_q", q, dweight_q, dbias_q));
    return gradients_of_map("dweight_k", "dbias_k", k, dweight_k, dbias_k);
  }
  int gradients_of_map(const char* weight, const char* bias, const lol_features& f,
                       const lol_tensor& dweight, const lol_tensor& dbias) const {
    if (!present(f.weight)) {
      LOL_TRY(absent(weight, dweight, "a feature map"));
      return absent(bias, dbias, "a feature map");
    }
    const int64_t* s = f.weight.shape;
    LOL_TRY(contiguous(weight, dweight, LOL_F32, {s[0], s[1], s[2]}));
    if (!present(f.bias)) return absent(bias, dbias, "a bias");
    return contiguous(bias, dbias, LOL_F32, {s[0], s[2]});
  }

  int qkv_gradients(const lol_tensor& q, const lol_tensor& k, const lol_tensor& v,
                    const lol_tensor& dq, const lol_tensor& dk, const lol_tensor& dv) const {
    LOL_TRY(gradient("dq", dq, q));
    LOL_TRY(gradient("dk", dk, k));
    return gradient("dv", dv, v);
  }
  int gradient(const char* name, const lol_tensor& t, const lol_tensor& of) const {
    return output(name, t, of.dtype, {of.shape[0], of.shape[1], of.shape[2], of.shape[3]});
  }
  int like(const char* name, const lol_tensor& t, const lol_tensor& other) const {
    return strided(name, t, other.dtype,
                   {other.shape[0], other.shape[1], other.shape[2], other.shape[3]});
  }

 private:
  const char* op_;
  const lol_context& context_;
};

}  // namespace lol
