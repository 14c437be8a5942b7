// Call on torch's boxed stack.
#pragma once
#include <string>

#include "../operators.h"
#include "stable_abi.h"

namespace lolcats::torch_abi {

class TorchCall final : public Call {
 public:
  explicit TorchCall(StableIValue* stack) : stack_(stack) {}
  TorchCall(const TorchCall&) = delete;
  TorchCall& operator=(const TorchCall&) = delete;
  ~TorchCall();

  lol_tensor tensor(const char* name) override;
  lol_tensor mutable_tensor(const char* name) override { return tensor(name); }
  lol_tensor optional_tensor(const char* name) override;
  int64_t integer(const char*) override { return static_cast<int64_t>(next()); }
  double number(const char*) override;
  bool boolean(const char*) override { return next() != 0; }

  lol_tensor result(const lol_tensor& like) override;
  lol_context context() override;
  void run(const std::function<int()>& kernel) override;

  void return_results();  // hands them to torch, in the place of the arguments

 private:
  StableIValue next() { return stack_[argument_++]; }
  lol_tensor view(TensorHandle handle, const char* name);
  void expect_device(TensorHandle handle, const char* name);

  static constexpr int kMost = 24;  // tensors of one call: hybrid_attention_step_ takes 19
  StableIValue* stack_;
  int argument_ = 0;
  TensorHandle arguments_[kMost], results_[kMost];
  int argument_count_ = 0, result_count_ = 0;
  const char* first_ = nullptr;  // the name of the first tensor, and where it and the results are
  int32_t device_type_ = 0, device_index_ = 0;
  std::string error_;  // the first one; raised once every argument is owned
};

}  // namespace lolcats::torch_abi
