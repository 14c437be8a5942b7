/* lolcats_ops: linearized attention kernels. The plain C ABI; bindings and other programs include
 * this file alone. SPEC is SPEC.md, beside it where it is installed, docs/SPEC.md in the sources.
 *
 * Shapes: B batch, T sequence, H query heads, Hk key/value heads (H % Hk == 0), D query/key head
 * dim, V value head dim, f learned feature width, F width after the activation (2f two-sided, else
 * f), Hf heads of a feature map (H or Hk; for feature_map alone, any divisor of H), Hs heads of the
 * recurrent state (= Hf of feature_k), N packed sequences, P slots of a state pool, R ring size, s
 * sinks; D, V and f are 1 to 256. Sequence tensors are [B, H, T, D] with any strides, last
 * dimension contiguous, fp32, bf16 or fp16; q, k, v, o share a dtype. Parameters, statistics,
 * states and their gradients are fp32. Arithmetic is fp32. Addresses are multiples of the size of
 * an element.
 *
 * Every function returns LOL_OK or an error code; lol_last_error() then, and only then, says which
 * argument was wrong, what it was and what is needed. On error nothing has been written. A gate
 * that is not finite is an error on the CPU; on a GPU values are not looked at.
 *
 * Outputs overlap neither inputs nor each other. All of them are computed and have to be there, but
 * for the gradients of inputs that are absent. struct_size is sizeof the struct, in every struct
 * that has one, and has to be what the library was built with: any change of a struct is a new
 * LOL_ABI_VERSION.
 *
 * Any number of threads may call at the same time. On the CPU each of them has a team of its own,
 * of as many threads as OpenMP says in it (OMP_NUM_THREADS, omp_set_num_threads), and results do
 * not depend on how many those are. Scratch memory comes from the heap and is given back before
 * the call returns; a calling thread's stack needs 256 KiB. After fork() without exec a child that
 * inherits the library's threads uses one; where others of the process had used OpenMP, and the
 * library had not, the child has to set its threads to 1 (omp_set_num_threads) before it calls.
 */
#ifndef LOLCATS_OPS_H
#define LOLCATS_OPS_H
#include <stddef.h>
#include <stdint.h>

#ifndef LOL_API
#define LOL_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define LOL_ABI_VERSION 1

typedef enum {
  LOL_F32 = 0,
  LOL_BF16 = 1,
  LOL_F16 = 2,
  LOL_I32 = 3,
  LOL_I64 = 4,
  LOL_BOOL = 5
} lol_dtype;
typedef enum {
  LOL_OK = 0,
  LOL_EINVAL = 1,
  LOL_EUNSUPPORTED = 2,
  LOL_ENOMEM = 3,
  LOL_ECUDA = 4
} lol_status;
typedef enum {
  LOL_SOFTMAX = 0,
  LOL_EXP = 1,
  LOL_ELU1 = 2,
  LOL_RELU = 3,
  LOL_IDENTITY = 4,
  LOL_FAVOR = 5
} lol_activation;
typedef enum { LOL_SLIDING = 0, LOL_TERRACE = 1 } lol_window_kind;

/* Strides count elements. An optional tensor is absent where its struct is {0}. A tensor without
 * elements has its ndim and shape, and needs no data. */
typedef struct lol_tensor {
  void* data;
  int32_t dtype;
  int32_t ndim;
  int64_t shape[4];
  int64_t stride[4];
} lol_tensor;

/* Feature map (SPEC 1): phi(x) = clamp(act(x @ weight[h] + bias[h] (+ x if skip)), min = eps);
 * identity is not clamped. */
typedef struct lol_features {
  lol_tensor weight; /* [Hf, D, f] contiguous fp32 */
  lol_tensor bias;   /* [Hf, f] contiguous fp32, or absent */
  int32_t activation;
  int32_t two_sided; /* softmax and exp only */
  int32_t skip;      /* needs f == D */
  double eps;
} lol_features;

/* Which device runs a call. device -1 is the CPU; a CUDA call is asynchronous on `stream`, a
 * cudaStream_t. */
typedef struct lol_context {
  int32_t device;
  void* stream;
} lol_context;

typedef struct lol_feature_map_args {
  size_t struct_size;
  lol_context context;
  lol_tensor x; /* [B, H, T, D] */
  lol_features features;
  lol_tensor y; /* out [B, H, T, F], dtype of x */
} lol_feature_map_args;

typedef struct lol_feature_map_backward_args {
  size_t struct_size;
  lol_context context;
  lol_tensor dy; /* [B, H, T, F], dtype of x */
  lol_tensor x;
  lol_features features;
  lol_tensor dx;      /* out [B, H, T, D] */
  lol_tensor dweight; /* out [Hf, D, f] */
  lol_tensor dbias;   /* out [Hf, f], absent without bias */
} lol_feature_map_backward_args;

/* Linear attention (SPEC 4). Without feature maps (weights absent) q and k are the features and F
 * == D. */
typedef struct lol_linear_attention_args {
  size_t struct_size;
  lol_context context;
  lol_tensor q, k, v;
  lol_features feature_q, feature_k; /* both or neither; one activation for both */
  double scale;
  int32_t normalize;
  double eps;
  lol_tensor kv0, ksum0; /* initial state [B|N, Hs, F, V], [B|N, Hs, F], contiguous, or absent */
  lol_tensor cu_seqlens; /* [N+1] int32 or int64 contiguous, or absent; needs B == 1. Tokens past
                            its last offset are padding */
  lol_tensor key_padding_mask; /* [B, T] bool, True = real, or absent */
  lol_tensor o;                /* out [B, H, T, V] */
  lol_tensor den;              /* out [B, H, T] contiguous; ones where normalize == 0 */
  lol_tensor kv, ksum;         /* out, final state; contiguous */
} lol_linear_attention_args;

typedef struct lol_linear_attention_backward_args {
  size_t struct_size;
  lol_linear_attention_args
      forward;           /* with its outputs o and den as inputs; kv and ksum are not read */
  lol_tensor do_;        /* [B, H, T, V] */
  lol_tensor dkv, dksum; /* gradient of the final state; each may be absent (zero) */
  lol_tensor dq, dk, dv; /* out */
  lol_tensor dweight_q, dbias_q, dweight_k, dbias_k; /* out, absent where the parameter is */
  lol_tensor dkv0, dksum0;                           /* out, absent without an initial state */
} lol_linear_attention_backward_args;

/* Hybrid attention (SPEC 3). */
typedef struct lol_hybrid_attention_args {
  size_t struct_size;
  lol_context context;
  lol_tensor q, k, v;
  lol_features feature_q, feature_k; /* one activation for both */
  lol_tensor gate;                   /* [H] raw parameter, sigmoid inside */
  int64_t window;
  int32_t window_kind;
  int64_t sink;
  double scale;
  int32_t affine;
  lol_tensor cu_seqlens, key_padding_mask; /* as in linear attention */
  lol_tensor o;                            /* out [B, H, T, V]; 0 for padded queries */
  lol_tensor m, den; /* out [B, H, T] contiguous: window maximum and denominator per query */
} lol_hybrid_attention_args;

typedef struct lol_hybrid_attention_backward_args {
  size_t struct_size;
  lol_hybrid_attention_args forward; /* with its outputs o, m and den as inputs; m is not read, but
                                        found anew with the keys that tie at it */
  lol_tensor do_;
  lol_tensor dq, dk, dv;
  lol_tensor dweight_q, dbias_q, dweight_k, dbias_k, dgate;
} lol_hybrid_attention_backward_args;

/* Recurrent state (SPEC 5): kv and ksum hold the positions [s, folded), the ring holds [folded,
 * length) at slot position % R, the sinks hold [0, min(s, length)). R - w (sliding) or R - 2w
 * (terrace) is the slack that can be rewound. Before the first token length, folded, kv and ksum
 * are zero; what the ring and the sinks hold then does not matter. */
typedef struct lol_state {
  lol_tensor kv;             /* [P, Hs, F, V] contiguous */
  lol_tensor ksum;           /* [P, Hs, F] contiguous */
  lol_tensor k_ring, v_ring; /* [P, Hk, R, D|V] contiguous, dtype of q */
  lol_tensor k_sink, v_sink; /* [P, Hk, s, D|V] contiguous, dtype of q; not absent where s is 0 */
  lol_tensor length, folded; /* [P] int64 contiguous */
} lol_state;

/* Appends T tokens per sequence to the state, in place, and returns their outputs. Any T; T = 1 is
 * the decode step. */
typedef struct lol_hybrid_attention_step_args {
  size_t struct_size;
  lol_context context;
  lol_tensor q, k, v;
  lol_features feature_q, feature_k;
  lol_tensor gate;
  int64_t window;
  int32_t window_kind;
  double scale;
  int32_t affine;
  lol_state state;
  lol_tensor state_indices; /* [B|N] int32 or int64, distinct slots of the pool, or absent: sequence
                               b uses slot b */
  lol_tensor cu_seqlens, key_padding_mask;
  lol_tensor o;
  int64_t lazy; /* how many tokens of the ring's slack may wait: they are folded, lazy + 1 at once,
                   when the ring is full; until then kv is only read. They cannot be rewound. */
} lol_hybrid_attention_step_args;

/* Attention transfer (SPEC 7). */
typedef struct lol_attention_transfer_args {
  size_t struct_size;
  lol_hybrid_attention_args student; /* its o is not written and may be absent; m and den are */
  int32_t with_xent;
  lol_tensor teacher;   /* out [B, H, T, V]: causal softmax attention */
  lol_tensor mse, xent; /* out, one fp32 each; xent is 0 without with_xent */
  lol_tensor residual;  /* out [B, H, T, V] contiguous fp32: student - teacher */
  lol_tensor delta;     /* out [B, H, T] contiguous: residual . student */
  lol_tensor lse;       /* out [B, H, T] contiguous: the teacher's log-sum-exp */
} lol_attention_transfer_args;

typedef struct lol_attention_transfer_backward_args {
  size_t struct_size;
  lol_attention_transfer_args forward; /* with residual, delta, lse, m and den as inputs; teacher,
                                          mse and xent are not read */
  lol_tensor d_mse, d_xent;            /* one fp32 each */
  lol_tensor dweight_q, dbias_q, dweight_k, dbias_k, dgate;
} lol_attention_transfer_backward_args;

LOL_API int lol_feature_map(const lol_feature_map_args* args);
LOL_API int lol_feature_map_backward(const lol_feature_map_backward_args* args);
LOL_API int lol_linear_attention(const lol_linear_attention_args* args);
LOL_API int lol_linear_attention_backward(const lol_linear_attention_backward_args* args);
LOL_API int lol_hybrid_attention(const lol_hybrid_attention_args* args);
LOL_API int lol_hybrid_attention_backward(const lol_hybrid_attention_backward_args* args);
LOL_API int lol_hybrid_attention_step(const lol_hybrid_attention_step_args* args);
LOL_API int lol_attention_transfer(const lol_attention_transfer_args* args);
LOL_API int lol_attention_transfer_backward(const lol_attention_transfer_backward_args* args);

LOL_API int lol_abi_version(void);
LOL_API const char* lol_last_error(void); /* of this thread, valid until its next call */
/* The instruction set in use: "scalar", "avx2", "avx512", "avx512_bf16" or "amx"; the best one, or
 * what the environment variable LOLCATS_ISA or lol_set_cpu_isa names. Null if LOLCATS_ISA names one
 * that this CPU or build lacks. */
LOL_API const char* lol_cpu_isa(void);
LOL_API int lol_set_cpu_isa(const char* name); /* LOL_EUNSUPPORTED if this CPU or build lacks it */
LOL_API int lol_cpu_isa_count(void);           /* instruction sets that this CPU can run */
LOL_API const char* lol_cpu_isa_name(int index); /* best first */
LOL_API int lol_max_threads(void);
LOL_API int lol_has_cuda(void); /* built with CUDA kernels */

/* One launch of a CUDA kernel. Whoever compiles kernels/cuda (NVRTC, say) can run the operators of
 * a build without CUDA, or replace those of one with it: with context.device >= 0, feature_map, the
 * forward attentions and hybrid_attention_step check their arguments, plan, and call the launcher.
 * Pointers then are the device's; what lies behind them is not checked. */
typedef struct lol_cuda_launch {
  const char* kernel; /* C++ name expression, such as "lol::cuda::feature_map<float, true>" */
  uint32_t blocks, threads, shared_bytes; /* of one dimension; dynamic shared memory */
  const void* params;                     /* the kernel's only parameter, by value */
  size_t params_size;
  lol_context context;
} lol_cuda_launch;
/* LOL_OK; LOL_EUNSUPPORTED where the device has too little shared memory for a block: a kernel that
 * needs less is then tried, if there is one; or LOL_ECUDA. Must not throw. */
typedef int (*lol_cuda_launcher)(const lol_cuda_launch* launch, void* user);
/* For launchers: why they failed, in lol_last_error(); NULL stands for "". */
LOL_API void lol_set_last_error(const char* message);
/* For the whole process; null for the library's own. Not while another thread calls an operator. */
LOL_API void lol_set_cuda_launcher(lol_cuda_launcher launcher, void* user);
/* Instead of the process's, in this thread alone; null ends that. A launcher that only notes what
 * it is handed tells how a call would run, or why it cannot, on any machine: nothing reads through
 * the call's pointers. */
LOL_API void lol_set_thread_cuda_launcher(lol_cuda_launcher launcher, void* user);
/* Whether operators run on CUDA: built with the kernels, or a launcher is set. */
LOL_API int lol_can_launch_cuda(void);

#ifdef __cplusplus
}
#endif
#endif
