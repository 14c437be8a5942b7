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
struct Single {
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

using Matrices = u16[4][8][8];

// Lane l holds elements 2 (l % 4) and the next of row l / 4, or of that column when transposed.
template <bool kTransposed>
u16& element(Matrices& matrices, int matrix, int lane, int which) {
  int major = row_group(lane), minor = 2 * column_group(lane) + which;
  return kTransposed ? matrices[matrix][minor][major] : matrices[matrix][major][minor];
}

// Calls f(shared memory, row) for each row, of 16 bytes. The addresses of the rows of matrix m come
// from lanes 8 m to 8 m + 7; immediate[2]: offset.
template <class F>
void for_rows(Warp& w, const Instruction& i, int address, int count, Access kind,
              Matrices& matrices, F f) {
  const int pc = w.pc_of(i), rows = 8 * count;
  u64 addresses[kLanes];
  for (int r = 0; r < rows; r++) {
    const u8* row = reinterpret_cast<u8*>(matrices[r / 8][r % 8]);
    addresses[r] = w.get(i, address, r) + s64(i.immediate[2]);
    w.launch.shared.access(w, pc, r, addresses[r], 16, kind, row);
  }
  for (int r = 0; r < rows; r++) f(w.launch.shared.at(u32(addresses[r])), matrices[r / 8][r % 8]);
  Counters& counters = w.launch.counters[pc];
  counters.requests++;
  if (w.launch.first_block) count_wavefronts(counters, addresses, lanes_at_start(rows, 0), 16);
}

template <bool kTransposed>
void load_matrix(Warp& w, const Instruction& i, u32) {
  const int count = i.destinations;
  Matrices matrices;
  for_rows(w, i, count, count, Access::read, matrices,
           [](const u8* shared, u16* row) { std::memcpy(row, shared, 16); });
  for (int m = 0; m < count; m++)
    for (int l = 0; l < kLanes; l++)
      w.set(i, m, l,
            element<kTransposed>(matrices, m, l, 0) | u32(element<kTransposed>(matrices, m, l, 1))
                                                          << 16);
}

template <bool kTransposed>
void store_matrix(Warp& w, const Instruction& i, u32) {
  const int count = i.operands - 1;
  Matrices matrices;
  for (int m = 0; m < count; m++)
    for (int l = 0; l < kLanes; l++)
      for (int v = 0; v < 2; v++)
        element<kTransposed>(matrices, m, l, v) = u16(w.get(i, 1 + m, l) >> (16 * v));
  for_rows(w, i, 0, count, Access::write, matrices,
           [](u8* shared, const u16* row) { std::memcpy(shared, row, 16); });
}

}  // namespace

void add_tensor_core() {
  // The last number: of d, a, b and c together.
  add_operation("mma.m16n8k16.bf16", mma<Packed<bf16>, 16>, Flow::warp, 14);
  add_operation("mma.m16n8k16.f16", mma<Packed<f16>, 16>, Flow::warp, 14);
  add_operation("mma.m16n8k8.bf16", mma<Packed<bf16>, 8>, Flow::warp, 11);
  add_operation("mma.m16n8k8.f16", mma<Packed<f16>, 8>, Flow::warp, 11);
  add_operation("mma.m16n8k8.tf32", mma<Single, 8>, Flow::warp, 14);
  add_operation("mma.m16n8k4.tf32", mma<Single, 4>, Flow::warp, 11);
  add_operation("ldmatrix", load_matrix<false>, Flow::warp);
  add_operation("ldmatrix.trans", load_matrix<true>, Flow::warp);
  add_operation("stmatrix", store_matrix<false>, Flow::warp);
  add_operation("stmatrix.trans", store_matrix<true>, Flow::warp);
}

}  // namespace ptx
