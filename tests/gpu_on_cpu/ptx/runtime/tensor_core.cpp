// mma.sync, ldmatrix, stmatrix. Fragment layouts: PTX ISA, "Matrix Fragments for mma.m16n8k...".
//
// Products are exact in fp32; sums are fp32, rounded to nearest, which is at least as good as what
// the hardware does with the bits below.
#include "launch.h"

namespace ptx {
namespace {

// How registers hold the operands of a format: values per register, and their conversion.
template <class T>
struct Packed {  // two 16-bit floats
  static constexpr int kValues = 2;
  static float value(u32 bits, int k) { return std::bit_cast<T>(u16(bits >> (16 * k))); }
};
struct Tf32 {
  static constexpr int kValues = 1;
  static float value(u32 bits, int) { return tf32_to_float(bits); }
};

constexpr int row_group(int lane) { return lane / 4; }
constexpr int column_group(int lane) { return lane % 4; }

// A register of lane l holds row l / 4 (+ 8 for every second one) and columns of its group of four.
template <class Format, int K>
void gather_a(Warp& w, const Instruction& i, int first, float (&a)[16][K]) {
  constexpr int kValues = Format::kValues;
  for (int r = 0; r < 16 * K / kLanes / kValues; r++) {
    const u32* registers = w.values<u32>(i, first + r);
    for (int l = 0; l < kLanes; l++)
      for (int v = 0; v < kValues; v++)
        a[row_group(l) + r % 2 * 8][column_group(l) * kValues + v + r / 2 * 4 * kValues] =
            Format::value(registers[l], v);
  }
}

template <class Format, int K>
void gather_b(Warp& w, const Instruction& i, int first, float (&b)[K][8]) {
  constexpr int kValues = Format::kValues;
  for (int r = 0; r < 8 * K / kLanes / kValues; r++) {
    const u32* registers = w.values<u32>(i, first + r);
    for (int l = 0; l < kLanes; l++)
      for (int v = 0; v < kValues; v++)
        b[column_group(l) * kValues + v + r * 4 * kValues][row_group(l)] =
            Format::value(registers[l], v);
  }
}

// D = A B + C, 16 x 8. Destinations: 4 registers; sources: A, B, then 4 of C.
template <class Format, int K>
void mma(Warp& w, const Instruction& i, u32) {
  float a[16][K], b[K][8], sum[16][8] = {};
  constexpr int kD = 4, kA = 16 * K / kLanes / Format::kValues, kB = kA / 2;
  gather_a<Format>(w, i, kD, a);
  gather_b<Format>(w, i, kD + kA, b);
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < K; k++)
      for (int column = 0; column < 8; column++) sum[row][column] += a[row][k] * b[k][column];
  for (int r = 0; r < kD; r++) {
    float *d = w.values<float>(i, r), *c = w.values<float>(i, kD + kA + kB + r);
    for (int l = 0; l < kLanes; l++)
      d[l] = c[l] + sum[row_group(l) + r / 2 * 8][column_group(l) * 2 + r % 2];
  }
}

// ------------------------------------------------------------------ 8 x 8 matrices of 16-bit
// values

// The addresses of the rows of matrix m come from lanes 8 m to 8 m + 7. immediate[2]: offset.
struct Rows {
  std::array<u64, kLanes> addresses{};

  Rows(Warp& w, const Instruction& i, int address, int matrices, Access kind) {
    const int pc = w.pc_of(i), lanes = 8 * matrices;
    for (int l = 0; l < lanes; l++) {
      addresses[l] = w.get(i, address, l) + s64(i.immediate[2]);
      w.launch.shared.access(w, pc, l, addresses[l], 16, kind);
    }
    Counters& counters = w.launch.counters[pc];
    counters.requests++;
    if (w.launch.first_block)
      count_wavefronts(counters, addresses.data(), lanes_at_start(lanes, 0), 16);
  }
  u8* element(Warp& w, int matrix, int row, int column) const {
    return w.launch.shared.at(u32(addresses[8 * matrix + row])) + 2 * column;
  }
};

// Lane l holds elements 2 (l % 4) and the next of row l / 4, or of that column when transposed.
template <bool kTransposed>
u8* half(Warp& w, const Rows& rows, int matrix, int lane, int which) {
  int major = row_group(lane), minor = 2 * column_group(lane) + which;
  return kTransposed ? rows.element(w, matrix, minor, major)
                     : rows.element(w, matrix, major, minor);
}

template <bool kTransposed>
void load_matrix(Warp& w, const Instruction& i, u32) {
  Rows rows(w, i, i.destinations, i.destinations, Access::read);
  for (int m = 0; m < i.destinations; m++)
    for (int l = 0; l < kLanes; l++) {
      u16 values[2];
      for (int v = 0; v < 2; v++) std::memcpy(&values[v], half<kTransposed>(w, rows, m, l, v), 2);
      w.set(i, m, l, u32(values[1]) << 16 | values[0]);
    }
}

template <bool kTransposed>
void store_matrix(Warp& w, const Instruction& i, u32) {
  Rows rows(w, i, 0, i.operands - 1, Access::write);
  for (int m = 0; m < i.operands - 1; m++)
    for (int l = 0; l < kLanes; l++)
      for (int v = 0; v < 2; v++) {
        u16 value = u16(w.get(i, 1 + m, l) >> (16 * v));
        std::memcpy(half<kTransposed>(w, rows, m, l, v), &value, 2);
      }
}

}  // namespace

void add_tensor_core() {
  add_operation("mma.m16n8k16.bf16", mma<Packed<bf16>, 16>, Flow::warp);
  add_operation("mma.m16n8k16.f16", mma<Packed<f16>, 16>, Flow::warp);
  add_operation("mma.m16n8k8.bf16", mma<Packed<bf16>, 8>, Flow::warp);
  add_operation("mma.m16n8k8.f16", mma<Packed<f16>, 8>, Flow::warp);
  add_operation("mma.m16n8k8.tf32", mma<Tf32, 8>, Flow::warp);
  add_operation("mma.m16n8k4.tf32", mma<Tf32, 4>, Flow::warp);
  add_operation("ldmatrix", load_matrix<false>, Flow::warp);
  add_operation("ldmatrix.trans", load_matrix<true>, Flow::warp);
  add_operation("stmatrix", store_matrix<false>, Flow::warp);
  add_operation("stmatrix.trans", store_matrix<true>, Flow::warp);
}

}  // namespace ptx
