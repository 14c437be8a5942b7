// For the C++ that launches kernels: it defines `run`, the program's main calls it.
#pragma once

#include <map>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "emulator/language.h"

namespace emulator {

// What the Python side passes by name: tensors, which are written back at the end; numbers; texts.
class Arguments {
 public:
  Arguments(int count, char** arguments);
  void write_back() const;

  // On the heap, of exactly the tensor's size; null if it was None. A name that was not passed is
  // an error, here and below.
  template <class T>
  T* tensor(const std::string& name) const {
    return static_cast<T*>(bytes(name));
  }
  const std::string& text(const std::string& name) const;
  template <class T>
  T number(const std::string& name) const {
    if constexpr (std::is_integral<T>::value) return static_cast<T>(std::stoll(text(name)));
    return static_cast<T>(std::stod(text(name)));
  }

 private:
  struct Tensor {
    std::string name;
    void* data;
    std::size_t size;
  };
  void* bytes(const std::string& name) const;

  std::string folder_;
  std::vector<Tensor> tensors_;
  std::map<std::string, std::string> texts_;
};

void launch(dim3 grid, dim3 block, std::size_t shared_bytes, void (*kernel)(const void*),
            const void* arguments);

// kernel<<<grid, block, shared_bytes>>>(arguments...), to its end.
template <class... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
            typename Same<Parameters>::type... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  };
  const Call call{kernel, {arguments...}};
  launch(
      grid, block, shared_bytes,
      [](const void* data) {
        const Call& call = *static_cast<const Call*>(data);
        std::apply(call.kernel, call.arguments);
      },
      &call);
}

}  // namespace emulator

void run(emulator::Arguments& arguments);
