// wgmma (sm_90): products of matrices that are in shared memory, executed asynchronously.
//
// D is 64 x N: each of the four warps computes its 16 rows, of its rows of A and all of B. Results
// are computed at issue; until wgmma.wait_group the registers of D must not be touched, those of A
// and the operands in shared memory not be written, and whoever does so is reported.
#include "launch.h"

namespace ptx {
namespace {

constexpr int kRegister = 64;  // the assembler aligns registers to this

RegisterUse& use(Warp& w, s32 offset) { return w.in_flight[offset / kRegister]; }

// ------------------------------------------------------------------ matrices in shared memory

// A matrix descriptor (PTX ISA, "Matrix Descriptor Format"). A matrix is walked in 16-byte chunks.
struct Matrix {
  u64 start, leading, stride;
  int row_bytes;  // of a swizzled row: 128, 64 or 32; 16 without swizzling
  bool contiguous_in_k;
  int size;  // bytes of an element

  Matrix(u64 descriptor, bool transposed, int element_bytes)
      : start((descriptor & 0x3fff) << 4),
        leading((descriptor >> 16 & 0x3fff) << 4),
        stride((descriptor >> 32 & 0x3fff) << 4),
        contiguous_in_k(!transposed),
        size(element_bytes) {
    constexpr int kRowBytes[4] = {16, 128, 64, 32};
    row_bytes = kRowBytes[descriptor >> 62];
    if (descriptor >> 49 & 7) throw Fault("not supported: a matrix descriptor with a base offset");
  }
  bool swizzled() const { return row_bytes > 16; }

  // Where the chunk with element (outer, k) begins; outer is a row of A or a column of B.
  u64 chunk(int outer, int k) const {
    u64 address;
    if (contiguous_in_k) {
      int byte = k * size;
      address = start + outer / 8 * stride + outer % 8 * row_bytes +
                (swizzled() ? byte : byte / 16 * leading);
    } else {
      int wide = row_bytes / size;
      address = start + outer / wide * (swizzled() ? leading : stride) +
                k / 8 * (swizzled() ? stride : leading) + k % 8 * row_bytes + outer % wide * size;
    }
    // The pattern repeats every 8 rows: bits 7 to 9 of the address are the row.
    return address ^ (address >> 3 & u64(row_bytes - 16));
  }
};

template <class T>
float element(const u8* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof value);
  return float(value);
}

// Reads `outers` x K elements into f(outer, k, value).
template <class T, int K, class F>
void read_matrix(Warp& w, int pc, const Matrix& matrix, int outers, F f) {
  constexpr int kPerChunk = 16 / sizeof(T);
  SharedMemory& shared = w.launch.shared;
  auto read = [&](int outer, int k) {
    u64 address = matrix.chunk(outer, k);
    const u8* bytes = shared.begin_operand(w, pc, address);
    w.mma_groups.back().chunks.push_back(u32(address));
    for (int e = 0; e < kPerChunk; e++) {
      float value = element<T>(bytes + e * sizeof(T));
      if (matrix.contiguous_in_k)
        f(outer, k + e, value);
      else
        f(outer + e, k, value);
    }
  };
  if (matrix.contiguous_in_k)
    for (int outer = 0; outer < outers; outer++)
      for (int k = 0; k < K; k += kPerChunk) read(outer, k);
  else
    for (int k = 0; k < K; k++)
      for (int outer = 0; outer < outers; outer += kPerChunk) read(outer, k);
}

// ------------------------------------------------------------------ registers in flight

void mark_accumulator(Warp& w, s32 offset) {
  use(w, offset).written++;
  w.registers_in_flight++;
  w.mma_groups.back().accumulators.push_back(offset);
}

void mark_operand(Warp& w, s32 offset) {
  use(w, offset).read++;
  w.registers_in_flight++;
  w.mma_groups.back().operands.push_back(offset);
}

void release(Warp& w, const MmaGroup& group) {
  for (s32 offset : group.accumulators) use(w, offset).written--;
  for (s32 offset : group.operands) use(w, offset).read--;
  w.registers_in_flight -= int(group.accumulators.size() + group.operands.size());
  for (u32 chunk : group.chunks) w.launch.shared.end_operand(w, chunk);
}

}  // namespace

void check_in_flight(Warp& w, const Instruction& i) {
  if (operations()[i.operation].name.starts_with("wgmma.mma_async")) return;  // checks for itself
  for (int k = 0; k < i.operands; k++) {
    const RegisterUse& in_flight = use(w, w.operand(i, k).offset);
    bool writes = k < i.destinations;
    if (in_flight.written || (in_flight.read && writes))
      w.launch.find(w, {.hazard = Hazard::accumulator,
                        .pc = w.pc_of(i),
                        .writes = writes,
                        .other_writes = in_flight.written > 0});
  }
}

void check_finished(Warp& w) {
  for (const PendingCopy& copy : w.copies)
    w.launch.find(w, {.hazard = Hazard::unfinished, .pc = copy.pc});
  if (w.registers_in_flight) w.launch.find(w, {.hazard = Hazard::unfinished, .pc = w.mma_pc});
}

namespace {

// Destinations: N / 2 registers of D. Sources: A (4 registers, or a descriptor), the descriptor of
// B, whether to add to D, then D again. immediate[2]: bit 0 and 1: negate A, B; bit 2 and 3: A, B
// are transposed, bit 4: A is in registers.
template <class T, int K>
struct Wgmma {
  static constexpr int kMaxN = 256;
  using B = float[K][kMaxN];
  using A = float[16][K];

  static void gather_a_registers(Warp& w, const Instruction& i, float sign, A& a) {
    constexpr int kValues = 4 / sizeof(T);
    for (int r = 0; r < 4; r++)
      for (int l = 0; l < kLanes; l++)
        for (int v = 0; v < kValues; v++) {
          u32 bits = u32(w.get(i, i.destinations + r, l)) >> (v * 8 * sizeof(T));
          a[l / 4 + r % 2 * 8][l % 4 * kValues + v + r / 2 * 4 * kValues] =
              sign * element<T>(reinterpret_cast<const u8*>(&bits));
        }
  }

  // All of the 64 rows count as read, because the operation as a whole reads them.
  static void gather_a_shared(Warp& w, const Instruction& i, float sign, A& a) {
    Matrix matrix(w.get(i, i.destinations, 0), i.immediate[2] & 4, sizeof(T));
    int first = w.index % 4 * 16;
    read_matrix<T, K>(w, w.pc_of(i), matrix, 64, [&](int row, int k, float value) {
      if (row >= first && row < first + 16) a[row - first][k] = sign * value;
    });
  }

  static void run(Warp& w, const Instruction& i, u32) {
    const int n = i.destinations * 2, flags = i.immediate[2];
    const bool a_in_registers = flags & 16;
    const int b_operand = i.destinations + (a_in_registers ? 4 : 1);
    static A a;
    static B b;
    if (a_in_registers)
      gather_a_registers(w, i, flags & 1 ? -1.f : 1.f, a);
    else
      gather_a_shared(w, i, flags & 1 ? -1.f : 1.f, a);
    Matrix matrix(w.get(i, b_operand, 0), flags & 8, sizeof(T));
    const float sign = flags & 2 ? -1.f : 1.f;
    read_matrix<T, K>(w, w.pc_of(i), matrix, n,
                      [&](int column, int k, float value) { b[k][column] = sign * value; });
    accumulate(w, i, n, w.predicate(i, b_operand + 1) & 1, a, b);
    track(w, i, a_in_registers);
  }

  static void accumulate(Warp& w, const Instruction& i, int n, bool adds, const A& a, const B& b) {
    static float sum[16][kMaxN];
    for (int row = 0; row < 16; row++) {
      std::fill_n(sum[row], n, 0.f);
      for (int k = 0; k < K; k++)
        for (int column = 0; column < n; column++) sum[row][column] += a[row][k] * b[k][column];
    }
    for (int r = 0; r < n / 2; r++) {
      float* d = w.values<float>(i, r);
      for (int l = 0; l < kLanes; l++)
        d[l] = (adds ? d[l] : 0.f) + sum[l / 4 + r / 2 % 2 * 8][r / 4 * 8 + l % 4 * 2 + r % 2];
    }
  }

  static void track(Warp& w, const Instruction& i, bool a_in_registers) {
    w.mma_pc = w.pc_of(i);
    for (int r = 0; a_in_registers && r < 4; r++) {
      s32 offset = w.operand(i, i.destinations + r).offset;
      if (use(w, offset).written)
        w.launch.find(w, {.hazard = Hazard::accumulator, .pc = w.mma_pc, .other_writes = true});
      mark_operand(w, offset);
    }
    for (int r = 0; r < i.destinations; r++) mark_accumulator(w, w.operand(i, r).offset);
  }
};

void commit(Warp& w, const Instruction&, u32) { w.mma_groups.emplace_back(); }

// immediate[2]: how many of the newest groups may stay in flight.
void wait(Warp& w, const Instruction& i, u32) {
  while (int(w.mma_groups.size()) - 1 > i.immediate[2]) {
    release(w, w.mma_groups.front());
    w.mma_groups.erase(w.mma_groups.begin());
  }
}

void proxy_fence(Warp& w, const Instruction&, u32) { w.launch.shared.proxy_fence(w); }

}  // namespace

void add_wgmma() {
  add_operation("wgmma.mma_async.k16.bf16", Wgmma<bf16, 16>::run, Flow::warp);
  add_operation("wgmma.mma_async.k16.f16", Wgmma<f16, 16>::run, Flow::warp);
  add_operation("wgmma.mma_async.k8.tf32", Wgmma<tf32, 8>::run, Flow::warp);
  add_operation("wgmma.commit_group", commit, Flow::warp);
  add_operation("wgmma.wait_group", wait, Flow::warp);
  add_operation("fence.proxy.async", proxy_fence);
}

}  // namespace ptx
