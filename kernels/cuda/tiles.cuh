// Tiles of numbers in shared memory, and products of them by tensor cores.
//
// Fragments are those of mma.m16n8k16. Of a 16 x 8 tile of sums, a thread has the columns 2 (lane
// % 4) and the next one, of the rows lane / 4 (sums 0 and 1) and 8 below it (2 and 3). Two such
// tiles side by side, rounded and packed, are a left operand: nothing moves between products.
#pragma once
#include "memory.cuh"

namespace lol {
namespace cuda {

// Rows of kColumns numbers, in chunks of 8. Groups of chunks are permuted by the number of the row,
// so that rows that are loaded or stored at once lie in different banks: eight of 16-bit numbers;
// of fp32 four in a row, and every other one of eight if the columns are a multiple of 32.
template <class T, int kColumns>
struct Tile {
  static_assert(kColumns % 8 == 0, "");
  using Number = T;
  static constexpr int kChunks = kColumns / 8;
  T* data;

  __device__ __forceinline__ T* at(int row, int chunk) const {
    constexpr int per_line = 16 / sizeof(T);          // chunks in all the banks
    constexpr int power_of_two = kChunks & -kChunks;  // that divides them: rows are aligned to it
    constexpr int group = power_of_two < per_line ? power_of_two : per_line;
    int by = row / (per_line / group);  // the rows of a line are not permuted against each other
    if (sizeof(T) == 4) by ^= by >> 2;
    // Masks and not remainders, which cost more of what could be negative.
    return data + (((row * kColumns + (by & (group - 1)) * 8) ^ (chunk & (power_of_two - 1)) * 8) +
                   (chunk & -power_of_two) * 8);
  }
  // Columns 2 i and the next one.
  __device__ __forceinline__ Pair<T>& pair(int row, int i) const {
    return reinterpret_cast<Pair<T>*>(at(row, i / 4))[i % 4];
  }
  // Row `row` and the next one.
  __device__ __forceinline__ Pair<T> pair_of_rows(int row, int column) const {
    return pack<T>(at(row, column / 8)[column % 8], at(row + 1, column / 8)[column % 8]);
  }
  // From row `first` on, a multiple of 16, after which permutations are repeated.
  __device__ __forceinline__ Tile rows(int first) const { return {data + first * kColumns}; }
};

// Asked for once in every phase of a chunk: what is computed from them then waits in registers only
// as long.
__device__ __forceinline__ int this_lane() { return ptx::thread_of_block() % 32; }
__device__ __forceinline__ int this_warp() { return ptx::thread_of_block() / 32; }

// ---- Operands of 16 x 16, by ldmatrix, which has no version for fp32

// Left, tile[m][k].
template <class T, int n>
__device__ __forceinline__ void load_left(int lane, unsigned (&a)[4], const Tile<T, n>& tile, int m,
                                          int k) {
  ptx::ldmatrix(a, tile.rows(m).at(lane % 16, k / 8 ^ lane / 16));
}
template <int n>
__device__ __forceinline__ void load_left(int lane, float2 (&a)[4], const Tile<float, n>& tile,
                                          int m, int k) {
#pragma unroll
  for (int i = 0; i < 4; i++)
    a[i] = tile.rows(m).pair(i % 2 * 8 + lane / 4, k / 2 + i / 2 * 4 + lane % 4);
}

// Left, tile[k][m].
template <class T, int n>
__device__ __forceinline__ void load_left_transposed(int lane, unsigned (&a)[4],
                                                     const Tile<T, n>& tile, int m, int k) {
  ptx::ldmatrix_trans(a, tile.rows(k).at(lane / 16 * 8 + lane % 8, m / 8 ^ lane / 8 % 2));
}
template <int n>
__device__ __forceinline__ void load_left_transposed(int lane, float2 (&a)[4],
                                                     const Tile<float, n>& tile, int m, int k) {
#pragma unroll
  for (int i = 0; i < 4; i++)
    a[i] = tile.rows(k).pair_of_rows(i / 2 * 8 + lane % 4 * 2, m + i % 2 * 8 + lane / 4);
}

// Right, tile[k][n]: the left half of the columns in b[0], b[1].
template <class T, int width>
__device__ __forceinline__ void load_right(int lane, unsigned (&b)[4], const Tile<T, width>& tile,
                                           int k, int n) {
  ptx::ldmatrix_trans(b, tile.rows(k).at(lane % 16, n / 8 ^ lane / 16));
}
template <int width>
__device__ __forceinline__ void load_right(int lane, float2 (&b)[4], const Tile<float, width>& tile,
                                           int k, int n) {
#pragma unroll
  for (int i = 0; i < 4; i++)
    b[i] = tile.rows(k).pair_of_rows(i % 2 * 8 + lane % 4 * 2, n + i / 2 * 8 + lane / 4);
}
// The left half alone, of a tile of 8 columns.
template <class T>
__device__ __forceinline__ void load_right(int lane, unsigned (&b)[2], const Tile<T, 8>& tile,
                                           int k) {
  ptx::ldmatrix_trans(b, tile.rows(k).at(lane % 16, 0));
}
__device__ __forceinline__ void load_right(int lane, float2 (&b)[2], const Tile<float, 8>& tile,
                                           int k) {
#pragma unroll
  for (int i = 0; i < 2; i++) b[i] = tile.rows(k).pair_of_rows(i * 8 + lane % 4 * 2, lane / 4);
}

// Right, tile[n][k].
template <class T, int width>
__device__ __forceinline__ void load_right_transposed(int lane, unsigned (&b)[4],
                                                      const Tile<T, width>& tile, int k, int n) {
  ptx::ldmatrix(b, tile.rows(n).at(lane / 16 * 8 + lane % 8, k / 8 ^ lane / 8 % 2));
}
template <int width>
__device__ __forceinline__ void load_right_transposed(int lane, float2 (&b)[4],
                                                      const Tile<float, width>& tile, int k,
                                                      int n) {
#pragma unroll
  for (int i = 0; i < 4; i++)
    b[i] = tile.rows(n).pair(i / 2 * 8 + lane / 4, k / 2 + i % 2 * 4 + lane % 4);
}

// ---- Products

// How often a loop over what lies in shared memory is unrolled, for F features. Large ones would
// take minutes to compile.
template <class T, int kF>
constexpr int kUnrollFor = sizeof(T) * kF > 256 ? 1 : 16;

// The left and right half of 16 columns.
template <class T>
__device__ __forceinline__ void multiply(float (&left)[4], float (&right)[4], const Pair<T> (&a)[4],
                                         const Pair<T> (&b)[4]) {
  mma_m16n8k16<T>(left, a, {b[0], b[1]});
  mma_m16n8k16<T>(right, a, {b[2], b[3]});
}

// Rows k to k + 15 of `right` and kColumns columns from `first` on, 16 at a time, to use(tile of 8
// columns, counted from there; the operand).
template <int kColumns, class Right, class Use>
__device__ __forceinline__ void for_columns(int lane, const Right& right, int k, int first,
                                            const Use& use) {
#pragma unroll
  for (int column = 0; column < kColumns; column += 16) {
    Pair<typename Right::Number> b[4];
    load_right(lane, b, right, k, first + column);
    use(column / 8, b);
  }
}

// d[16 x kColumns] += a right[k .. k + 15][first .. first + kColumns - 1]
template <int kColumns, int kTiles, class Right, class A>
__device__ __forceinline__ void multiply_row(int lane, float (&d)[kTiles][4], const A (&a)[4],
                                             const Right& right, int k, int first = 0) {
  for_columns<kColumns>(lane, right, k, first, [&](int n, const A(&b)[4]) {
    multiply<typename Right::Number>(d[n], d[n + 1], a, b);
  });
}

// d[16 x 8] += a times a column of ones.
template <class T>
__device__ __forceinline__ void multiply_ones(int lane, float (&d)[4], const Pair<T> (&a)[4]) {
  const Pair<T> ones = lane < 4 ? pack<T>(1.f, 1.f) : Pair<T>{};
  mma_m16n8k16<T>(d, a, {ones, ones});
}

// Two tiles of sums as a left operand.
template <class T>
__device__ __forceinline__ void pack_left(Pair<T> (&a)[4], const float (&left)[4],
                                          const float (&right)[4]) {
  a[0] = pack<T>(left[0], left[1]);
  a[1] = pack<T>(left[2], left[3]);
  a[2] = pack<T>(right[0], right[1]);
  a[3] = pack<T>(right[2], right[3]);
}

// What rounding in pack_left lost.
template <class T>
__device__ __forceinline__ void subtract_rounded(float (&left)[4], float (&right)[4],
                                                 const Pair<T> (&a)[4]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    left[2 * half] -= low<T>(a[half]);
    left[2 * half + 1] -= high<T>(a[half]);
    right[2 * half] -= low<T>(a[2 + half]);
    right[2 * half + 1] -= high<T>(a[2 + half]);
  }
}

// ---- A row of sums belongs to four threads

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// ---- Copies

// Some of a sequence's tokens: those of a list, or `first` and its successors.
struct Tokens {
  const int* list;
  int first;
  __device__ __forceinline__ int operator[](int i) const { return list ? list[i] : first + i; }
};

// A warp brings rows of `width` numbers of `count` tokens, at most 16, to a tile; zeros elsewhere.
// Asynchronously, if the rows are wide (memory.cuh), follow one another and are not converted.
template <class T, class From, int kColumns>
__device__ __forceinline__ void copy_rows(int lane, const Tile<T, kColumns>& to, const From* from,
                                          int64 stride, const Tokens& tokens, int count, int width,
                                          bool wide) {
  constexpr int kRows = 16, kPer = kPerChunk<From>, kPieces = kColumns / kPer;
  if constexpr (!kSame<T, From>) {
    if (wide) {
#pragma unroll 2
      for (int i = lane; i < kRows * kPieces; i += 32) {
        const int row = i / kPieces, column = i % kPieces * kPer;
        Chunk<From> chunk = {};
        if (row < count && column < width)
          chunk = load_chunk<From, true>(from + tokens[row] * stride, column, width);
        store_floats(to.at(row, column / 8), chunk);
      }
      return;
    }
  } else if (wide && !tokens.list) {
    constexpr int kPower = kPieces & -kPieces;
    constexpr int kAcross = kPower < 32 ? kPower : 32, kStep = 32 / kAcross;  // at a time
    const int first = lane / kAcross;
#pragma unroll
    for (int n = 0; n < kPieces; n += kAcross) {
      const int column = (n + lane % kAcross) * kPer;
      const T* source = from + (tokens.first + first) * stride + column;
#pragma unroll
      for (int row = 0; row < kRows; row += kStep) {
        const bool inside = first + row < count && column < width;
        ptx::cp_async<16>(to.at(first + row, column / 8) + column % 8, inside ? source : from,
                          inside ? 16 : 0);
        source += kStep * stride;
      }
    }
    return;
  }
#pragma unroll 1
  for (int i = lane; i < kRows * kColumns; i += 32) {
    const int row = i / kColumns, column = i % kColumns;
    to.at(row, column / 8)[column % 8] =
        row < count && column < width ? convert<T>(from[tokens[row] * stride + column]) : T{};
  }
}

}  // namespace cuda
}  // namespace lol
