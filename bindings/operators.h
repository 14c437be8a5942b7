// The operators as every framework sees them: a schema, and a function that reads its arguments in
// schema order, allocates the results and calls the C ABI. A framework only implements Call.
#pragma once
#include <functional>

#include "lolcats_ops/lolcats_ops.h"

namespace lolcats {

// One invocation of an operator. Arguments are consumed in schema order, results are returned in
// the order they were allocated, and the object keeps both alive. Nothing is validated here: the
// C library does that, and entries of a view beyond the tensor's rank read as 0.
class Call {
 public:
  virtual lol_tensor tensor(const char* name) = 0;
  virtual lol_tensor mutable_tensor(const char* name) = 0;
  virtual lol_tensor optional_tensor(const char* name) = 0;  // {0}, absent, if not given
  virtual int64_t integer(const char* name) = 0;
  virtual double number(const char* name) = 0;
  virtual bool boolean(const char* name) = 0;

  // The next result, with the dtype, shape and strides of `like`; its data is ignored.
  virtual lol_tensor result(const lol_tensor& like) = 0;
  // Where to run; called after the arguments, throws if they are on different devices.
  virtual lol_context context() = 0;
  // Calls the C library; throws the framework's exception with lol_last_error() if that fails.
  virtual void run(const std::function<int()>& kernel) = 0;

 protected:
  ~Call() = default;
};

struct Operator {
  const char* name;
  const char* schema;  // arguments and results, as torch writes them
  void (*run)(Call&);
};

constexpr int kOperatorCount = 9;
extern const Operator kOperators[kOperatorCount];

}  // namespace lolcats
