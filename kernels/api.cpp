// The C ABI: check the arguments, lay out the sequences, run the kernels of the device and
// instruction set in use.
#include <cstdlib>
#include <exception>
#include <new>
#include <stdexcept>
#include <vector>

#include "arguments.h"
#include "check.h"
#include "cpu/call.h"
#include "cuda/launch.h"
#ifdef _OPENMP
#include <omp.h>
#endif

namespace lol {
namespace {

// The sequences that cu_seqlens or key_padding_mask describe. Padding on either side leaves a run
// of rows; only a mask with holes needs an index.
class Layout {
 public:
  Layout(const lol_tensor& q, const lol_tensor& cu_seqlens, const lol_tensor& mask,
         const lol_tensor& slots = {}) {
    const int64_t B = q.shape[0], T = q.shape[2];
    const int64_t count = cu_seqlens.data ? cu_seqlens.shape[0] - 1 : B;
    if (count > FEW) many_.resize((size_t)count);
    Sequence* sequences = count > FEW ? many_.data() : few_;
    if (mask.data) rows_.resize((size_t)(B * T));
    int64_t real = 0;
    for (int64_t n = 0; n < count; n++) {
      Sequence& s = sequences[n];
      if (cu_seqlens.data) {
        const int64_t first = index_at(cu_seqlens, n);
        s = {0, index_at(cu_seqlens, n + 1) - first, first, nullptr, n};
      } else if (mask.data) {
        s = masked(n, (const uint8_t*)mask.data + n * mask.stride[0], T);
      } else {
        s = {n, T, 0, nullptr, n};
      }
      if (slots.data) s.slot = index_at(slots, n);
      real += s.tokens;
    }
    batch_ = {sequences, count, real, real < B * T};
  }
  Layout(const Layout&) = delete;
  Layout& operator=(const Layout&) = delete;
  const Batch& batch() const { return batch_; }

 private:
  // As many as a decode step for one user has, and more: those take no memory from the heap.
  static constexpr int64_t FEW = 16;

  Sequence masked(int64_t b, const uint8_t* real, int64_t T) {
    int32_t* rows = rows_.data() + b * T;
    int64_t n = 0;
    for (int64_t i = 0; i < T; i++) {
      if (real[i]) rows[n++] = (int32_t)i;
    }
    const int64_t first = n ? rows[0] : 0;
    const bool run = n == 0 || rows[n - 1] - first == n - 1;
    return {b, n, first, run ? nullptr : rows, b};
  }

  Sequence few_[FEW];
  std::vector<Sequence> many_;
  std::vector<int32_t> rows_;
  Batch batch_;
};

const lol_hybrid_attention_args& layout_of(const lol_hybrid_attention_args& a) { return a; }
const lol_hybrid_attention_args& layout_of(const lol_hybrid_attention_backward_args& a) {
  return a.forward;
}
const lol_hybrid_attention_args& layout_of(const lol_attention_transfer_args& a) {
  return a.student;
}
const lol_hybrid_attention_args& layout_of(const lol_attention_transfer_backward_args& a) {
  return a.forward.student;
}
const lol_linear_attention_args& layout_of(const lol_linear_attention_args& a) { return a; }
const lol_linear_attention_args& layout_of(const lol_linear_attention_backward_args& a) {
  return a.forward;
}

template <class Args>
Layout make_layout(const Args& a) {
  const auto& shared = layout_of(a);
  return Layout(shared.q, shared.cu_seqlens, shared.key_padding_mask);
}
Layout make_layout(const lol_hybrid_attention_step_args& a) {
  return Layout(a.q, a.cu_seqlens, a.key_padding_mask, a.state_indices);
}

int report(int status) {
  if (status == LOL_ENOMEM) fail("lolcats_ops: out of memory for scratch buffers");
  return status;
}

// No exception crosses the C ABI.
template <class Body>
int guarded(Body body) {
  try {
    return report(body());
  } catch (const std::bad_alloc&) {
    return report(LOL_ENOMEM);
  } catch (const std::length_error&) {  // of a vector that no memory would hold
    return report(LOL_ENOMEM);
  } catch (const std::exception& error) {
    return fail("lolcats_ops: %s", error.what());
  }
}

// Operators that have CUDA kernels run there when they are asked to.
template <class Args>
int run_on_cuda(const Args& args) {
  return guarded([&] {
    const int status = check(args);
    return status ? status : cuda::run(args);
  });
}

template <class Args>
int ready(const Args* args) {
  if (!args) return fail("lolcats_ops: args is null");
  if (const int status = check(*args)) return status;
  if (cpu_kernels()) return LOL_OK;
  const char* wanted = std::getenv("LOLCATS_ISA");
  fail("lolcats_ops: LOLCATS_ISA is %s, on this CPU this build has %s", wanted ? wanted : "empty",
       isa_names());
  return LOL_EUNSUPPORTED;
}

template <class Args>
int run(const Args* args, int (*Kernels::*kernel)(const Args&, const Batch&)) {
  return guarded([&] {
    if (const int status = ready(args)) return status;
    const Layout layout = make_layout(*args);
    return (cpu_kernels()->*kernel)(*args, layout.batch());
  });
}

template <class Args>
int run(const Args* args, int (*Kernels::*kernel)(const Args&)) {
  return guarded([&] {
    const int status = ready(args);
    return status ? status : (cpu_kernels()->*kernel)(*args);
  });
}

}  // namespace
}  // namespace lol

using lol::Kernels;

extern "C" {

int lol_feature_map(const lol_feature_map_args* a) {
  if (a && a->context.device >= 0) return lol::run_on_cuda(*a);
  return lol::run(a, &Kernels::feature_map);
}
int lol_feature_map_backward(const lol_feature_map_backward_args* a) {
  return lol::run(a, &Kernels::feature_map_backward);
}
int lol_linear_attention(const lol_linear_attention_args* a) {
  if (a && a->context.device >= 0) return lol::run_on_cuda(*a);
  return lol::run(a, &Kernels::linear_attention);
}
int lol_linear_attention_backward(const lol_linear_attention_backward_args* a) {
  return lol::run(a, &Kernels::linear_attention_backward);
}
int lol_hybrid_attention(const lol_hybrid_attention_args* a) {
  if (a && a->context.device >= 0) return lol::run_on_cuda(*a);
  return lol::run(a, &Kernels::hybrid_attention);
}
int lol_hybrid_attention_backward(const lol_hybrid_attention_backward_args* a) {
  return lol::run(a, &Kernels::hybrid_attention_backward);
}
int lol_hybrid_attention_step(const lol_hybrid_attention_step_args* a) {
  if (a && a->context.device >= 0) return lol::run_on_cuda(*a);
  return lol::run(a, &Kernels::hybrid_attention_step);
}
int lol_attention_transfer(const lol_attention_transfer_args* a) {
  return lol::run(a, &Kernels::attention_transfer);
}
int lol_attention_transfer_backward(const lol_attention_transfer_backward_args* a) {
  return lol::run(a, &Kernels::attention_transfer_backward);
}

int lol_abi_version(void) { return LOL_ABI_VERSION; }
const char* lol_last_error(void) { return lol::last_error(); }
void lol_set_last_error(const char* message) { lol::fail("%s", message ? message : ""); }
int lol_max_threads(void) {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

}  // extern "C"
