#include "instructions.cuh"

#include "cuda_harness.h"
#include "tensor_core.cuh"

void run(emulator::Arguments& arguments) {
  using emulator::launch;
  const std::string name = arguments.text("kernel");
  const auto number = [&](const char* of) { return arguments.number<int>(of); };
  const auto* ints = arguments.tensor<int>("x");
  const auto* floats = arguments.tensor<float>("x");
  const auto* shorts = arguments.tensor<unsigned short>("x");
  const auto* bytes = arguments.tensor<unsigned char>("x");
  const auto b = [&] { return arguments.tensor<unsigned short>("b"); };
  auto* result = arguments.tensor<unsigned>("y");
  auto* sums = arguments.tensor<float>("y");
  if (name == "warp") launch(warp_functions, 1, 32, 0, ints, arguments.tensor<int>("y"));
  if (name == "atomics") launch(atomics, 3, {8, 4}, 0, ints, arguments.tensor<int>("y"));
  if (name == "conversions")
    launch(conversions, (number("n") + 255) / 256, 256, 0, floats, number("n"),
           arguments.tensor<unsigned short>("bf16"), arguments.tensor<unsigned short>("f16"),
           result, arguments.tensor<float>("back"));
  if (name == "extremes")
    launch(extremes, 1, number("n"), 0, arguments.tensor<unsigned>("x"),
           arguments.tensor<unsigned>("b"), number("n"), result);
  if (name == "mma_bf16")
    launch(multiply_16<Loads::by_hand, ptx::mma_m16n8k16_bf16>, 1, 32, 0, shorts, b(), sums);
  if (name == "mma_f16")
    launch(multiply_16<Loads::by_hand, ptx::mma_m16n8k16_f16>, 1, 32, 0, shorts, b(), sums);
  if (name == "ldmatrix_mma_bf16")
    launch(multiply_16<Loads::ldmatrix, ptx::mma_m16n8k16_bf16>, 1, 32, 0, shorts, b(), sums);
  if (name == "mma_tf32")
    launch(multiply_tf32, 1, 32, 0, floats, arguments.tensor<float>("b"), sums);
  if (name == "ldmatrix") {
    const auto kernel = [&]() -> void (*)(const unsigned short*, unsigned*) {
      const bool transposed = number("transposed") != 0;
      switch (number("matrices")) {
        case 1:
          return transposed ? load_matrices<1, true> : load_matrices<1, false>;
        case 2:
          return transposed ? load_matrices<2, true> : load_matrices<2, false>;
        default:
          return transposed ? load_matrices<4, true> : load_matrices<4, false>;
      }
    }();
    launch(kernel, 1, 32, 0, shorts, result);
  }
  if (name == "copy_part") {
    const int size = number("bytes");
    const auto kernel = size == 4 ? copy_part<4> : size == 8 ? copy_part<8> : copy_part<16>;
    launch(kernel, 1, 1, 0, bytes, number("count"), arguments.tensor<unsigned char>("y"));
  }
  if (name == "wait_for_older") launch(wait_for_older, 1, 1, 0, floats, sums);
}
