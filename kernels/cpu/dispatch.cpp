// Which instruction set runs: the best that this CPU has, or the one that LOLCATS_ISA or
// lol_set_cpu_isa names.
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(LOL_HAVE_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

#include "../check.h"
#include "call.h"

namespace lol {

#ifdef LOL_HAVE_AMX
namespace amx {
extern const Kernels kernels;
}
#endif
#ifdef LOL_HAVE_AVX512_BF16
namespace avx512_bf16 {
extern const Kernels kernels;
}
#endif
#ifdef LOL_HAVE_AVX512
namespace avx512 {
extern const Kernels kernels;
}
#endif
#ifdef LOL_HAVE_AVX2
namespace avx2 {
extern const Kernels kernels;
}
#endif
namespace scalar {
extern const Kernels kernels;
}
#ifdef LOL_HAVE_EMULATED
namespace emulated {
extern const Kernels kernels;
}
#endif

namespace {

#ifdef LOL_HAVE_AMX
// Linux lets a process use the tiles once it has asked; where they are missing it says no.
bool has_matrix_unit() {
#ifdef __linux__
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // arch_prctl, asm/prctl.h
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & AMX_BF16) && (edx & AMX_TILE) &&
         syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
  return false;
#endif
}
#endif

#if defined(__x86_64__)
// Older Clangs know no name for it.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

// Best first.
struct Available {
  const Kernels* list[7] = {};
  int count = 0;
  Available() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2") && has_f16c();
    (void)v3;
    (void)v4;
#endif
    [[maybe_unused]] bool amx = false;
#ifdef LOL_HAVE_AMX
    amx = v4 && __builtin_cpu_supports("avx512bf16") && has_matrix_unit();
    if (amx) list[count++] = &amx::kernels;
#endif
#ifdef LOL_HAVE_AVX512_BF16
    if (v4 && __builtin_cpu_supports("avx512bf16")) list[count++] = &avx512_bf16::kernels;
#endif
#ifdef LOL_HAVE_AVX512
    if (v4) list[count++] = &avx512::kernels;
#endif
#if defined(LOL_HAVE_AVX512) && defined(LOL_HAVE_AVX512_BF16)
    // On an Intel Xeon bf16 by vdpbf16ps took 1.4 and 1.6 times as long as fp32, to which it is
    // converted without it; on an AMD EPYC 0.6 times.
    if (count >= 2 && list[count - 2] == &avx512_bf16::kernels && __builtin_cpu_is("intel"))
      std::swap(list[count - 2], list[count - 1]);
#endif
#ifdef LOL_HAVE_AVX2
    if (v3) list[count++] = &avx2::kernels;
#endif
    list[count++] = &scalar::kernels;
#ifdef LOL_HAVE_EMULATED
    if (v3 && !amx) list[count++] = &emulated::kernels;
#endif
  }
  const Kernels* find(const char* isa) const {
    for (int i = 0; i < count; i++) {
      if (std::strcmp(list[i]->isa, isa) == 0) return list[i];
    }
    return nullptr;
  }
};

const Available& available() {
  static const Available instance;
  return instance;
}

std::atomic<const Kernels*> chosen{nullptr};

std::atomic<bool> threads_began{false}, threads_lost{false};

}  // namespace

const Kernels* cpu_kernels() {
  const Kernels* kernels = chosen.load(std::memory_order_acquire);
  if (!kernels) {
    const char* wanted = std::getenv("LOLCATS_ISA");
    const Kernels* first = wanted && *wanted ? available().find(wanted) : available().list[0];
    // Another thread's choice stays.
    if (chosen.compare_exchange_strong(kernels, first)) kernels = first;
  }
  return kernels;
}

const char* isa_names() {
  static const std::string names = [] {
    std::string list;
    for (int i = 0; i < available().count; i++)
      list += (i ? ", " : "") + std::string(available().list[i]->isa);
    return list;
  }();
  return names.c_str();
}

bool may_use_threads() {
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { threads_lost = threads_began.load(); });
  (void)registered;
  if (threads_lost.load(std::memory_order_relaxed)) return false;
  threads_began.store(true, std::memory_order_relaxed);
  return true;
}

}  // namespace lol

extern "C" {

const char* lol_cpu_isa(void) {
  const lol::Kernels* kernels = lol::cpu_kernels();
  return kernels ? kernels->isa : nullptr;
}
int lol_cpu_isa_count(void) { return lol::available().count; }
const char* lol_cpu_isa_name(int index) {
  return index >= 0 && index < lol::available().count ? lol::available().list[index]->isa : nullptr;
}
int lol_set_cpu_isa(const char* name) {
  const lol::Kernels* kernels = name ? lol::available().find(name) : nullptr;
  if (!kernels) {
    lol::fail("lol_set_cpu_isa: name is %s, needs one of %s", name ? name : "null",
              lol::isa_names());
    return LOL_EUNSUPPORTED;
  }
  lol::chosen.store(kernels, std::memory_order_release);
  return LOL_OK;
}

}  // extern "C"
