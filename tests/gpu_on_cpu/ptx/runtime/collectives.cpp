// What lanes do together: barriers, shuffles, votes, reductions; and control flow.
#include "launch.h"

namespace ptx {
namespace {

void nothing(Warp&, const Instruction&, u32) {}

// Sources: the barrier, the number of threads (0: the block). Warps arrive whole.
void barrier(Warp& w, const Instruction& i, u32) {
  int lane = __builtin_ctz(w.live), id = int(w.get(i, 0, lane)), expected = int(w.get(i, 1, lane));
  if (id > 15) throw Fault("there are 16 barriers");
  w.block.arrive(w, id, expected ? expected : w.launch.threads());
}

// ------------------------------------------------------------------ shfl

// The lane to read from, or a negative number if it is outside of the segment.
using Source = int (*)(int lane, int b, int first, int last);

int butterfly(int lane, int b, int, int last) { return (lane ^ b) <= last ? lane ^ b : -1; }
int indexed(int, int b, int first, int last) { return (first | b) <= last ? first | b : -1; }
int down(int lane, int b, int, int last) { return lane + b <= last ? lane + b : -1; }
int up(int lane, int b, int first, int) { return lane - b >= first ? lane - b : -1; }

// Destinations: value, whether it came from inside; sources: value, b, clamp and segment mask,
// lanes.
template <Source source>
void shuffle(Warp& w, const Instruction& i, u32 lanes) {
  std::array<u32, kLanes> values;
  std::memcpy(values.data(), w.values<u32>(i, 2), sizeof values);
  u32* result = w.values<u32>(i, 0);
  u32 inside = 0;
  for_lanes(lanes, [&](int l) {
    int b = int(w.get(i, 3, l) & 31), control = int(w.get(i, 4, l));
    int segment = control >> 8 & 31, clamp = control & 31;
    int first = l & segment, last = first | (clamp & ~segment);
    int from = source(l, source == indexed ? b & ~segment : b, first, last);
    if (from >= 0) inside |= 1u << l;
    if (from >= 0 && !(lanes >> from & 1))
      throw Fault("reads lane " + std::to_string(from) + ", which is not in its mask", l);
    result[l] = values[from >= 0 ? from : l];
  });
  u32& p = w.predicate(i, 1);
  p = (p & ~lanes) | inside;
}

// ------------------------------------------------------------------ vote, redux

// Sources: a predicate and whether to negate it (immediate[2]).
u32 votes(Warp& w, const Instruction& i, u32 lanes) {
  return (i.immediate[2] ? ~w.predicate(i, 1) : w.predicate(i, 1)) & lanes;
}

template <bool (*holds)(u32 votes, u32 lanes)>
void vote(Warp& w, const Instruction& i, u32 lanes) {
  u32& result = w.predicate(i, 0);
  result = (result & ~lanes) | (holds(votes(w, i, lanes), lanes) ? lanes : 0);
}
bool all(u32 votes, u32 lanes) { return votes == lanes; }
bool any(u32 votes, u32) { return votes != 0; }
bool uniform(u32 votes, u32 lanes) { return votes == lanes || !votes; }

void ballot(Warp& w, const Instruction& i, u32 lanes) {
  u32 result = votes(w, i, lanes);
  for_lanes(lanes, [&](int l) { w.set(i, 0, l, result); });
}

void active_mask(Warp& w, const Instruction& i, u32 lanes) {
  for_lanes(lanes, [&](int l) { w.set(i, 0, l, lanes); });
}

template <class T, class F>
void add_reduction(std::string name, F) {
  auto reduce = [](Warp& w, const Instruction& i, u32 lanes) {
    T result = w.values<T>(i, 1)[__builtin_ctz(lanes)];
    for_lanes(lanes & (lanes - 1), [&](int l) { result = F{}(result, w.values<T>(i, 1)[l]); });
    for_lanes(lanes, [&](int l) { w.values<T>(i, 0)[l] = result; });
  };
  add_operation(std::move(name), reduce, Flow::warp);
}

void add_reductions() {
  add_reduction<u32>("redux.add.u32", [](u32 a, u32 b) { return a + b; });
  add_reduction<u32>("redux.and.u32", [](u32 a, u32 b) { return a & b; });
  add_reduction<u32>("redux.or.u32", [](u32 a, u32 b) { return a | b; });
  add_reduction<u32>("redux.xor.u32", [](u32 a, u32 b) { return a ^ b; });
  add_reduction<u32>("redux.min.u32", [](u32 a, u32 b) { return std::min(a, b); });
  add_reduction<u32>("redux.max.u32", [](u32 a, u32 b) { return std::max(a, b); });
  add_reduction<s32>("redux.min.s32", [](s32 a, s32 b) { return std::min(a, b); });
  add_reduction<s32>("redux.max.s32", [](s32 a, s32 b) { return std::max(a, b); });
}

void trap(Warp&, const Instruction&, u32) { throw Fault("trap"); }

}  // namespace

void add_collectives() {
  add_operation("bra", nothing, Flow::branch);
  add_operation("exit", nothing, Flow::exit);
  add_operation("trap", trap);
  add_operation("nothing", nothing);
  add_operation("bar.warp.sync", nothing, Flow::warp);
  add_operation("bar.sync", barrier, Flow::barrier);
  add_operation("shfl.bfly", shuffle<butterfly>, Flow::warp);
  add_operation("shfl.idx", shuffle<indexed>, Flow::warp);
  add_operation("shfl.down", shuffle<down>, Flow::warp);
  add_operation("shfl.up", shuffle<up>, Flow::warp);
  add_operation("vote.all", vote<all>, Flow::warp);
  add_operation("vote.any", vote<any>, Flow::warp);
  add_operation("vote.uni", vote<uniform>, Flow::warp);
  add_operation("vote.ballot", ballot, Flow::warp);
  add_operation("activemask", active_mask);
  add_reductions();
}

}  // namespace ptx
