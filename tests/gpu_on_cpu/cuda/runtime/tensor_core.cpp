// mma.sync and ldmatrix. Fragment layouts: PTX ISA, "Matrix Fragments for mma.m16n8k...".
//
// Products are exact in fp32; sums are fp32, rounded to nearest, which is at least as good as what
// the hardware does with the bits below.
#include "../../ptx/runtime/numerics.h"
#include "machine.h"

namespace emulator {
namespace {

constexpr int row_group(int lane) { return lane / 4; }
constexpr int column_group(int lane) { return lane % 4; }

struct Fragments {
  float* d;
  const unsigned *a, *b;
};

struct Bf16 {
  static constexpr int kValues = 2;  // per register
  static float value(unsigned bits, int i) {
    return ptx::bf16_to_float(static_cast<ptx::u16>(bits >> (16 * i)));
  }
};
struct F16 {
  static constexpr int kValues = 2;
  static float value(unsigned bits, int i) {
    return ptx::f16_to_float(static_cast<ptx::u16>(bits >> (16 * i)));
  }
};
struct Tf32 {
  static constexpr int kValues = 1;
  static float value(unsigned bits, int) { return ptx::tf32_to_float(bits); }
};

template <class Operand>
void multiply_warp(const std::array<void*, kLanes>& brought, unsigned) {
  constexpr int kValues = Operand::kValues, K = 8 * kValues;
  float a[16][K], b[K][8], sum[16][8] = {};
  for (int l = 0; l < kLanes; l++) {
    const auto& lane = *static_cast<const Fragments*>(brought[l]);
    for (int v = 0; v < kValues; v++) {
      const int k = column_group(l) * kValues + v;
      for (int r = 0; r < 4; r++)
        a[row_group(l) + r % 2 * 8][k + r / 2 * K / 2] = Operand::value(lane.a[r], v);
      for (int r = 0; r < 2; r++) b[k + r * K / 2][row_group(l)] = Operand::value(lane.b[r], v);
    }
  }
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < K; k++)
      for (int column = 0; column < 8; column++) sum[row][column] += a[row][k] * b[k][column];
  for (int l = 0; l < kLanes; l++)
    for (int r = 0; r < 4; r++)
      static_cast<Fragments*>(brought[l])->d[r] +=
          sum[row_group(l) + r / 2 * 8][column_group(l) * 2 + r % 2];
}

struct Matrices {
  unsigned* registers;
  int count;
  bool transposed;
  const Row* row;
};

// Lane l gets elements 2 (l % 4) and the next of row l / 4, or of that column when transposed.
void load_warp(const std::array<void*, kLanes>& brought, unsigned) {
  for (int l = 0; l < kLanes; l++) {
    const auto& lane = *static_cast<const Matrices*>(brought[l]);
    for (int m = 0; m < lane.count; m++) {
      const auto element = [&](int row, int column) {
        const auto* words = static_cast<const Matrices*>(brought[8 * m + row])->row->words;
        return words[column / 2] >> (column % 2 * 16) & 0xffff;
      };
      const int major = row_group(l), minor = 2 * column_group(l);
      lane.registers[m] = lane.transposed ? element(minor, major) | element(minor + 1, major) << 16
                                          : element(major, minor) | element(major, minor + 1) << 16;
    }
  }
}

}  // namespace

void multiply(Format format, float* d, const unsigned* a, const unsigned* b, Site site) {
  Fragments mine{d, a, b};
  const auto execute = format == Format::bf16  ? multiply_warp<Bf16>
                       : format == Format::f16 ? multiply_warp<F16>
                                               : multiply_warp<Tf32>;
  meet({"mma.sync", site, kWholeWarp, true, execute, &mine});
}

void check_row(const void* row, Site site) {
  if (reinterpret_cast<std::uintptr_t>(row) % sizeof(Row) != 0)
    fault(site, "ldmatrix: misaligned row");
  if (!block->memory.is_shared(row, sizeof(Row)))
    fault(site, "ldmatrix: a row is not inside of shared memory");
}

void load_matrices(unsigned* registers, int matrices, bool transposed, const Row& row, Site site) {
  Matrices mine{registers, matrices, transposed, &row};
  meet({transposed ? "ldmatrix.trans" : "ldmatrix", site, kWholeWarp, true, load_warp, &mine});
}

unsigned short bf16_bits(float x) { return ptx::bf16_from_float(x); }
unsigned short f16_bits(float x) { return ptx::f16_from_float(x); }
float f16_value(unsigned short bits) { return ptx::f16_to_float(bits); }
unsigned tf32_bits(float x) { return ptx::tf32_from_float(std::bit_cast<unsigned>(x)); }
float flush_subnormal(float x) { return ptx::flush(x); }

}  // namespace emulator
