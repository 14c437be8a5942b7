#include "operators.h"

#include <algorithm>
#include <initializer_list>

namespace lolcats {
namespace {

template <class Args>
Args make_args() {
  Args args{};
  args.struct_size = sizeof(Args);
  return args;
}

// An empty tensor may have no data, but only an absent one has neither dimensions nor data.
bool is_absent(const lol_tensor& t) { return t.ndim == 0 && !t.data; }

// What no enumeration has stays what none has.
int32_t enumerator(int64_t value) {
  return static_cast<int32_t>(std::clamp<int64_t>(value, INT32_MIN, INT32_MAX));
}

// Arguments, in schema order

void read_activation(Call& call, lol_features& features) {
  features.activation = enumerator(call.integer("activation"));
  features.two_sided = call.boolean("two_sided");
  features.skip = call.boolean("skip");
  features.eps = call.number("feature_eps");
}

// Both maps of an attention share everything but their parameters.
template <class Args>
void read_activations(Call& call, Args& args) {
  read_activation(call, args.feature_q);
  args.feature_k.activation = args.feature_q.activation;
  args.feature_k.two_sided = args.feature_q.two_sided;
  args.feature_k.skip = args.feature_q.skip;
  args.feature_k.eps = args.feature_q.eps;
}

template <class Args>
void read_qkv(Call& call, Args& args) {
  args.q = call.tensor("q");
  args.k = call.tensor("k");
  args.v = call.tensor("v");
}

template <class Args>
void read_parameters(Call& call, Args& args) {
  args.feature_q.weight = call.tensor("weight_q");
  args.feature_q.bias = call.optional_tensor("bias_q");
  args.feature_k.weight = call.tensor("weight_k");
  args.feature_k.bias = call.optional_tensor("bias_k");
  args.gate = call.tensor("gate");
}

template <class Args>
void read_sequence(Call& call, Args& args) {
  args.cu_seqlens = call.optional_tensor("cu_seqlens");
  args.key_padding_mask = call.optional_tensor("key_padding_mask");
}

void read_inputs(Call& call, lol_linear_attention_args& args) {
  read_qkv(call, args);
  args.feature_q.weight = call.optional_tensor("weight_q");
  args.feature_q.bias = call.optional_tensor("bias_q");
  args.feature_k.weight = call.optional_tensor("weight_k");
  args.feature_k.bias = call.optional_tensor("bias_k");
  args.kv0 = call.optional_tensor("kv0");
  args.ksum0 = call.optional_tensor("ksum0");
  read_sequence(call, args);
}

void read_inputs(Call& call, lol_hybrid_attention_args& args) {
  read_qkv(call, args);
  read_parameters(call, args);
  read_sequence(call, args);
}

void read_settings(Call& call, lol_linear_attention_args& args) {
  args.scale = call.number("scale");
  args.normalize = call.boolean("normalize");
  args.eps = call.number("eps");
  read_activations(call, args);
}

void read_settings(Call& call, lol_hybrid_attention_args& args) {
  args.window = call.integer("window");
  args.window_kind = enumerator(call.integer("window_kind"));
  args.sink = call.integer("sink");
  args.scale = call.number("scale");
  args.affine = call.boolean("affine");
  read_activations(call, args);
}

// Results

using Shape = std::initializer_list<int64_t>;

lol_tensor contiguous(lol_tensor t) {
  int64_t step = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    t.stride[i] = step;
    step *= std::max<int64_t>(t.shape[i], 1);
  }
  return t;
}

lol_tensor contiguous(int32_t dtype, Shape shape) {
  lol_tensor t{};
  t.dtype = dtype;
  t.ndim = static_cast<int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), t.shape);
  return contiguous(t);
}

lol_tensor f32_result(Call& call, Shape shape) { return call.result(contiguous(LOL_F32, shape)); }

// [B, H, T, width] in the dtype and memory order of source. Hugging Face hands over transposed
// [B, T, H, D] tensors and wants the transposed result contiguous.
lol_tensor sequence_result(Call& call, const lol_tensor& source, int64_t width) {
  const int64_t batch = source.shape[0], heads = source.shape[1], tokens = source.shape[2];
  lol_tensor t = contiguous(source.dtype, {batch, heads, tokens, width});
  if (heads > 1 && tokens > 1 && source.stride[1] < source.stride[2]) {
    t.stride[1] = width;
    t.stride[2] = heads * width;
  }
  return call.result(t);
}

lol_tensor statistic_result(Call& call, const lol_tensor& q) {
  return f32_result(call, {q.shape[0], q.shape[1], q.shape[2]});
}

// The gradient of a fp32 tensor; an empty result where the tensor is absent.
lol_tensor gradient_result(Call& call, const lol_tensor& parameter) {
  if (is_absent(parameter)) {
    f32_result(call, {0});
    return {};
  }
  return call.result(contiguous(parameter));
}

template <class Args>
void allocate_map_gradients(Call& call, const lol_features& q, const lol_features& k, Args& args) {
  args.dweight_q = gradient_result(call, q.weight);
  args.dbias_q = gradient_result(call, q.bias);
  args.dweight_k = gradient_result(call, k.weight);
  args.dbias_k = gradient_result(call, k.bias);
}

template <class Inputs, class Args>
void allocate_qkv_gradients(Call& call, const Inputs& inputs, Args& args) {
  args.dq = sequence_result(call, inputs.q, inputs.q.shape[3]);
  args.dk = sequence_result(call, inputs.k, inputs.k.shape[3]);
  args.dv = sequence_result(call, inputs.v, inputs.v.shape[3]);
}

int64_t out_features(const lol_features& features) {
  const bool can_double = features.activation == LOL_SOFTMAX || features.activation == LOL_EXP;
  return features.weight.shape[2] * (can_double && features.two_sided ? 2 : 1);
}

// Operators

void feature_map(Call& call) {
  auto args = make_args<lol_feature_map_args>();
  args.x = call.tensor("x");
  args.features.weight = call.tensor("weight");
  args.features.bias = call.optional_tensor("bias");
  read_activation(call, args.features);
  args.context = call.context();
  args.y = sequence_result(call, args.x, out_features(args.features));
  call.run([&] { return lol_feature_map(&args); });
}

void feature_map_backward(Call& call) {
  auto args = make_args<lol_feature_map_backward_args>();
  args.dy = call.tensor("dy");
  args.x = call.tensor("x");
  args.features.weight = call.tensor("weight");
  args.features.bias = call.optional_tensor("bias");
  read_activation(call, args.features);
  args.context = call.context();
  args.dx = sequence_result(call, args.x, args.x.shape[3]);
  args.dweight = gradient_result(call, args.features.weight);
  args.dbias = gradient_result(call, args.features.bias);
  call.run([&] { return lol_feature_map_backward(&args); });
}

void linear_attention(Call& call) {
  auto args = make_args<lol_linear_attention_args>();
  read_inputs(call, args);
  read_settings(call, args);
  args.context = call.context();
  const bool mapped = !is_absent(args.feature_k.weight);
  const bool packed = !is_absent(args.cu_seqlens);
  const int64_t sequences =
      packed ? std::max<int64_t>(args.cu_seqlens.shape[0] - 1, 0) : args.q.shape[0];
  const int64_t heads = mapped ? args.feature_k.weight.shape[0] : args.k.shape[1];
  const int64_t features = mapped ? out_features(args.feature_k) : args.k.shape[3];
  args.o = sequence_result(call, args.q, args.v.shape[3]);
  args.den = statistic_result(call, args.q);
  args.kv = f32_result(call, {sequences, heads, features, args.v.shape[3]});
  args.ksum = f32_result(call, {sequences, heads, features});
  call.run([&] { return lol_linear_attention(&args); });
}

void linear_attention_backward(Call& call) {
  auto args = make_args<lol_linear_attention_backward_args>();
  auto& forward = args.forward = make_args<lol_linear_attention_args>();
  args.do_ = call.tensor("do");
  args.dkv = call.optional_tensor("dkv");
  args.dksum = call.optional_tensor("dksum");
  read_inputs(call, forward);
  forward.o = call.tensor("out");
  forward.den = call.tensor("den");
  read_settings(call, forward);
  forward.context = call.context();
  allocate_qkv_gradients(call, forward, args);
  allocate_map_gradients(call, forward.feature_q, forward.feature_k, args);
  args.dkv0 = gradient_result(call, forward.kv0);
  args.dksum0 = gradient_result(call, forward.ksum0);
  call.run([&] { return lol_linear_attention_backward(&args); });
}

void hybrid_attention(Call& call) {
  auto args = make_args<lol_hybrid_attention_args>();
  read_inputs(call, args);
  read_settings(call, args);
  args.context = call.context();
  args.o = sequence_result(call, args.q, args.v.shape[3]);
  args.m = statistic_result(call, args.q);
  args.den = statistic_result(call, args.q);
  call.run([&] { return lol_hybrid_attention(&args); });
}

void hybrid_attention_backward(Call& call) {
  auto args = make_args<lol_hybrid_attention_backward_args>();
  auto& forward = args.forward = make_args<lol_hybrid_attention_args>();
  args.do_ = call.tensor("do");
  read_inputs(call, forward);
  forward.o = call.tensor("out");
  forward.m = call.tensor("m");
  forward.den = call.tensor("den");
  read_settings(call, forward);
  forward.context = call.context();
  allocate_qkv_gradients(call, forward, args);
  allocate_map_gradients(call, forward.feature_q, forward.feature_k, args);
  args.dgate = gradient_result(call, forward.gate);
  call.run([&] { return lol_hybrid_attention_backward(&args); });
}

void hybrid_attention_step(Call& call) {
  auto args = make_args<lol_hybrid_attention_step_args>();
  read_qkv(call, args);
  read_parameters(call, args);
  args.state.kv = call.mutable_tensor("kv");
  args.state.ksum = call.mutable_tensor("ksum");
  args.state.k_ring = call.mutable_tensor("k_ring");
  args.state.v_ring = call.mutable_tensor("v_ring");
  args.state.k_sink = call.mutable_tensor("k_sink");
  args.state.v_sink = call.mutable_tensor("v_sink");
  args.state.length = call.mutable_tensor("length");
  args.state.folded = call.mutable_tensor("folded");
  args.state_indices = call.optional_tensor("state_indices");
  read_sequence(call, args);
  args.window = call.integer("window");
  args.window_kind = enumerator(call.integer("window_kind"));
  args.scale = call.number("scale");
  args.affine = call.boolean("affine");
  read_activations(call, args);
  args.context = call.context();
  args.o = sequence_result(call, args.q, args.v.shape[3]);
  call.run([&] { return lol_hybrid_attention_step(&args); });
}

void attention_transfer(Call& call) {
  auto args = make_args<lol_attention_transfer_args>();
  auto& student = args.student = make_args<lol_hybrid_attention_args>();
  read_inputs(call, student);
  args.with_xent = call.boolean("with_xent");
  read_settings(call, student);
  student.context = call.context();
  const auto& q = student.q;
  const int64_t width = student.v.shape[3];
  args.teacher = sequence_result(call, q, width);
  args.mse = f32_result(call, {});
  args.xent = f32_result(call, {});
  args.residual = f32_result(call, {q.shape[0], q.shape[1], q.shape[2], width});
  args.delta = statistic_result(call, q);
  student.m = statistic_result(call, q);
  student.den = statistic_result(call, q);
  args.lse = statistic_result(call, q);
  call.run([&] { return lol_attention_transfer(&args); });
}

void attention_transfer_backward(Call& call) {
  auto args = make_args<lol_attention_transfer_backward_args>();
  auto& forward = args.forward = make_args<lol_attention_transfer_args>();
  auto& student = forward.student = make_args<lol_hybrid_attention_args>();
  args.d_mse = call.tensor("d_mse");
  args.d_xent = call.tensor("d_xent");
  read_inputs(call, student);
  forward.residual = call.tensor("residual");
  forward.delta = call.tensor("delta");
  student.m = call.tensor("m");
  student.den = call.tensor("den");
  forward.lse = call.tensor("lse");
  forward.with_xent = call.boolean("with_xent");
  read_settings(call, student);
  student.context = call.context();
  allocate_map_gradients(call, student.feature_q, student.feature_k, args);
  args.dgate = gradient_result(call, student.gate);
  call.run([&] { return lol_attention_transfer_backward(&args); });
}

}  // namespace

#define FEATURES "int activation, bool two_sided, bool skip, float feature_eps"
#define QKV "Tensor q, Tensor k, Tensor v, "
#define PARAMETERS "Tensor weight_q, Tensor? bias_q, Tensor weight_k, Tensor? bias_k, Tensor gate, "
#define STATE                                                                                 \
  "Tensor(a!) kv, Tensor(b!) ksum, Tensor(c!) k_ring, Tensor(d!) v_ring, Tensor(e!) k_sink, " \
  "Tensor(f!) v_sink, Tensor(g!) length, Tensor(h!) folded, Tensor? state_indices, "
#define SEQUENCE "Tensor? cu_seqlens, Tensor? key_padding_mask, "
#define HYBRID_INPUTS QKV PARAMETERS SEQUENCE
#define HYBRID_SETTINGS "int window, int window_kind, int sink, float scale, bool affine, " FEATURES
#define LINEAR_INPUTS                                                                     \
  QKV "Tensor? weight_q, Tensor? bias_q, Tensor? weight_k, Tensor? bias_k, Tensor? kv0, " \
      "Tensor? ksum0, " SEQUENCE
#define LINEAR_SETTINGS "float scale, bool normalize, float eps, " FEATURES
#define QKV_GRADIENTS "Tensor dq, Tensor dk, Tensor dv, "
#define MAP_GRADIENTS "Tensor dweight_q, Tensor dbias_q, Tensor dweight_k, Tensor dbias_k"

const Operator kOperators[kOperatorCount] = {
    {"feature_map", "(Tensor x, Tensor weight, Tensor? bias, " FEATURES ") -> Tensor", feature_map},
    {"feature_map_backward",
     "(Tensor dy, Tensor x, Tensor weight, Tensor? bias, " FEATURES
     ") -> (Tensor dx, Tensor dweight, Tensor dbias)",
     feature_map_backward},
    {"linear_attention",
     "(" LINEAR_INPUTS LINEAR_SETTINGS ") -> (Tensor out, Tensor den, Tensor kv, Tensor ksum)",
     linear_attention},
    {"linear_attention_backward",
     "(Tensor do, Tensor? dkv, Tensor? dksum, " LINEAR_INPUTS
     "Tensor out, Tensor den, " LINEAR_SETTINGS ") -> (" QKV_GRADIENTS MAP_GRADIENTS
     ", Tensor dkv0, Tensor dksum0)",
     linear_attention_backward},
    {"hybrid_attention",
     "(" HYBRID_INPUTS HYBRID_SETTINGS ") -> (Tensor out, Tensor m, Tensor den)", hybrid_attention},
    {"hybrid_attention_backward",
     "(Tensor do, " HYBRID_INPUTS "Tensor out, Tensor m, Tensor den, " HYBRID_SETTINGS
     ") -> (" QKV_GRADIENTS MAP_GRADIENTS ", Tensor dgate)",
     hybrid_attention_backward},
    {"hybrid_attention_step_",
     "(" QKV PARAMETERS STATE SEQUENCE
     "int window, int window_kind, float scale, bool affine, " FEATURES ") -> Tensor",
     hybrid_attention_step},
    {"attention_transfer",
     "(" HYBRID_INPUTS "bool with_xent, " HYBRID_SETTINGS
     ") -> (Tensor teacher, Tensor mse, Tensor xent, Tensor residual, Tensor delta, Tensor m, "
     "Tensor den, Tensor lse)",
     attention_transfer},
    {"attention_transfer_backward",
     "(Tensor d_mse, Tensor d_xent, " HYBRID_INPUTS "Tensor residual, Tensor delta, Tensor m, "
     "Tensor den, Tensor lse, bool with_xent, " HYBRID_SETTINGS ") -> (" MAP_GRADIENTS
     ", Tensor dgate)",
     attention_transfer_backward},
};

}  // namespace lolcats
