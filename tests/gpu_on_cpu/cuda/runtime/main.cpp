// A program that runs kernels: PROGRAM FOLDER ARGUMENT..., either NAME=TEXT, or a tensor's name,
// which is that of a file in the folder, or -NAME for one that is absent.
#include <cstdio>
#include <cstdlib>

#include "cuda_harness.h"
#include "machine.h"

namespace emulator {
namespace {

constexpr std::size_t kAlignment = 256;  // of what GPUs allocate

// Opens a tensor's file, calls f and closes it.
template <class F>
void with_file(const std::string& path, const char* mode, F f) {
  std::FILE* file = std::fopen(path.c_str(), mode);
  if (!file || !f(file) || std::fclose(file)) fail(("cannot read or write " + path).c_str());
}

}  // namespace

Arguments::Arguments(int count, char** arguments) : folder_(std::string(arguments[1]) + "/") {
  for (int i = 2; i < count; i++) {
    const std::string argument = arguments[i];
    const std::size_t equals = argument.find('=');
    if (equals != std::string::npos) {
      texts_[argument.substr(0, equals)] = argument.substr(equals + 1);
      continue;
    }
    Tensor tensor{argument, nullptr, 0};
    if (argument[0] == '-') {  // None
      tensor.name = argument.substr(1);
      tensors_.push_back(tensor);
      continue;
    }
    with_file(folder_ + argument, "rb", [&](std::FILE* file) {
      std::fseek(file, 0, SEEK_END);
      tensor.size = static_cast<std::size_t>(std::ftell(file));
      std::rewind(file);
      if (posix_memalign(&tensor.data, kAlignment, tensor.size)) fail("no memory for a tensor");
      return std::fread(tensor.data, 1, tensor.size, file) == tensor.size;
    });
    tensors_.push_back(tensor);
  }
}

void Arguments::write_back() const {
  for (const Tensor& tensor : tensors_) {
    if (!tensor.data) continue;
    with_file(folder_ + tensor.name, "wb", [&](std::FILE* file) {
      return std::fwrite(tensor.data, 1, tensor.size, file) == tensor.size;
    });
  }
}

void* Arguments::bytes(const std::string& name) const {
  for (const Tensor& tensor : tensors_)
    if (tensor.name == name) return tensor.data;
  fail(("no tensor " + name).c_str());
}

const std::string& Arguments::text(const std::string& name) const {
  const auto found = texts_.find(name);
  if (found == texts_.end()) fail(("no argument " + name).c_str());
  return found->second;
}

}  // namespace emulator

int main(int count, char** arguments) {
  emulator::Arguments passed(count, arguments);
  run(passed);
  passed.write_back();
}
