// A program that runs kernels: PROGRAM FOLDER NAME=VALUE..., with a file per tensor in the folder.
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "cuda_harness.h"
#include "machine.h"

namespace emulator {
namespace {

constexpr std::size_t kAlignment = 256;  // of what GPUs allocate

}  // namespace

Arguments::Arguments(int count, char** arguments) : folder_(arguments[1]) {
  for (const auto& file : std::filesystem::directory_iterator(folder_)) {
    const std::size_t size = file.file_size();
    void* data = nullptr;
    if (posix_memalign(&data, kAlignment, size)) fail("no memory for a tensor");
    std::ifstream(file.path(), std::ios::binary)
        .read(static_cast<char*>(data), static_cast<std::streamsize>(size));
    tensors_[file.path().filename()] = {data, size};
  }
  for (int i = 2; i < count; i++) {
    const std::string argument = arguments[i];
    const std::size_t equals = argument.find('=');
    texts_[argument.substr(0, equals)] = argument.substr(equals + 1);
  }
}

void Arguments::write_back() const {
  for (const auto& [name, tensor] : tensors_)
    std::ofstream(folder_ + "/" + name, std::ios::binary)
        .write(static_cast<const char*>(tensor.data), static_cast<std::streamsize>(tensor.size));
}

void* Arguments::bytes(const std::string& name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : found->second.data;
}

const std::string& Arguments::text(const std::string& name) const {
  const auto found = texts_.find(name);
  if (found == texts_.end()) fail(("no argument " + name).c_str());
  return found->second;
}

void launch(dim3 grid, dim3 block, std::size_t shared_bytes, void (*kernel)(const void*),
            const void* arguments) {
  const char* order = std::getenv("CUDA_EMULATOR_ORDER");
  const auto seed = static_cast<unsigned>(order ? std::atoi(order) : 0);
  launch({grid, block, shared_bytes, kernel, arguments, seed});
}

}  // namespace emulator

int main(int count, char** arguments) {
  emulator::Arguments passed(count, arguments);
  run(passed);
  passed.write_back();
}
