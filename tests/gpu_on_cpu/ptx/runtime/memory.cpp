// Loads, stores, atomics, and asynchronous copies to shared memory.
#include "launch.h"

namespace ptx {
namespace {

using Addresses = std::array<u64, kLanes>;
using Pointers = std::array<u8*, kLanes>;
constexpr int kMaxAccess = 32;  // bytes per lane

// Address operands are a register, or a constant for variables, plus immediate[1].
Addresses addresses(Warp& w, const Instruction& i, int operand, u32 lanes, s32 offset) {
  Addresses result{};
  for_lanes(lanes, [&](int l) { result[l] = w.get(i, operand, l) + s64(offset); });
  return result;
}

struct Shared {};
struct Global {};

// Announces a request and says where its bytes are. values: what a store will write, lane by lane.
Pointers request(Shared, Warp& w, const Instruction& i, const Addresses& a, u32 lanes, int bytes,
                 Access kind, const u8* values = nullptr) {
  const int pc = w.pc_of(i);
  Pointers pointers{};
  for_lanes(lanes, [&](int l) {
    w.launch.shared.access(w, pc, l, a[l], bytes, kind, values ? values + l * bytes : nullptr);
    pointers[l] = w.launch.shared.at(u32(a[l]));
  });
  Counters& counters = w.launch.counters[pc];
  counters.requests++;
  // The same instruction does the same in every block: one is enough.
  if (w.launch.first_block) count_wavefronts(counters, a.data(), lanes, bytes);
  return pointers;
}
Pointers request(Global, Warp& w, const Instruction& i, const Addresses& a, u32 lanes, int bytes,
                 Access kind, const u8* = nullptr) {
  return w.launch.global.request(w, w.pc_of(i), a.data(), lanes, bytes, kind);
}

// immediate[0]: bytes of an element, [1]: offset, [2]: whether to extend by the sign. Destinations
// are the elements, the only source is the address.
template <class Space>
void load_from(Warp& w, const Instruction& i, u32 lanes, const Addresses& a) {
  const int size = i.immediate[0], unused = 64 - 8 * size;
  Pointers p = request(Space{}, w, i, a, lanes, size * i.destinations, Access::read);
  for_lanes(lanes, [&](int l) {
    for (int k = 0; k < i.destinations; k++) {
      u64 bits = 0;
      std::memcpy(&bits, p[l] + k * size, size);
      if (i.immediate[2]) bits = u64(s64(bits << unused) >> unused);
      w.set(i, k, l, bits);
    }
  });
}

// Sources: the address, the elements.
template <class Space>
void store_to(Warp& w, const Instruction& i, u32 lanes, const Addresses& a) {
  const int size = i.immediate[0], elements = i.operands - 1, bytes = size * elements;
  u8 values[kLanes * kMaxAccess] = {};
  for_lanes(lanes, [&](int l) {
    for (int k = 0; k < elements; k++) {
      u64 bits = w.get(i, 1 + k, l);
      std::memcpy(values + l * bytes + k * size, &bits, size);
    }
  });
  Pointers p = request(Space{}, w, i, a, lanes, bytes, Access::write, values);
  for_lanes(lanes, [&](int l) { std::memcpy(p[l], values + l * bytes, bytes); });
}

template <class Space>
void load(Warp& w, const Instruction& i, u32 lanes) {
  load_from<Space>(w, i, lanes, addresses(w, i, i.destinations, lanes, i.immediate[1]));
}
template <class Space>
void store(Warp& w, const Instruction& i, u32 lanes) {
  store_to<Space>(w, i, lanes, addresses(w, i, 0, lanes, i.immediate[1]));
}

// Splits generic addresses: f(Space, lanes, addresses).
template <class F>
void by_space(Warp& w, Addresses a, u32 lanes, F f) {
  u32 shared = 0;
  for_lanes(lanes, [&](int l) {
    if (a[l] - kSharedWindow >= u64(w.launch.shared.size())) return;
    a[l] -= kSharedWindow;
    shared |= 1u << l;
  });
  if (shared) f(Shared{}, shared, a);
  if (lanes & ~shared) f(Global{}, lanes & ~shared, a);
}

void load_generic(Warp& w, const Instruction& i, u32 lanes) {
  by_space(
      w, addresses(w, i, i.destinations, lanes, i.immediate[1]), lanes,
      [&]<class Space>(Space, u32 some, const Addresses& a) { load_from<Space>(w, i, some, a); });
}
void store_generic(Warp& w, const Instruction& i, u32 lanes) {
  by_space(
      w, addresses(w, i, 0, lanes, i.immediate[1]), lanes,
      [&]<class Space>(Space, u32 some, const Addresses& a) { store_to<Space>(w, i, some, a); });
}

// Addresses are offsets into the parameters.
void load_parameter(Warp& w, const Instruction& i, u32 lanes) {
  const int size = i.immediate[0], unused = 64 - 8 * size;
  const Addresses from = addresses(w, i, i.destinations, lanes, i.immediate[1]);
  for (int k = 0; k < i.destinations; k++) {
    for_lanes(lanes, [&](int l) {
      u64 bits = 0;
      std::memcpy(&bits, w.launch.parameters + from[l] + k * size, size);
      if (i.immediate[2]) bits = u64(s64(bits << unused) >> unused);
      w.set(i, k, l, bits);
    });
  }
}

// ------------------------------------------------------------------ atomics

// Destinations: the old values; sources: the address, one value per destination and, for cas,
// another.
template <class Space, class T, class F>
void atomic_at(Warp& w, const Instruction& i, u32 lanes, const Addresses& a) {
  const int n = i.destinations;
  Pointers p = request(Space{}, w, i, a, lanes, int(sizeof(T)) * n, Access::atomic);
  for_lanes(lanes, [&](int l) {
    for (int k = 0; k < n; k++) {
      u8* cell = p[l] + k * sizeof(T);
      T old, value, other;
      std::memcpy(&old, cell, sizeof(T));
      u64 bits = w.get(i, n + 1 + k, l), more = w.get(i, i.operands - 1, l), result = 0;
      std::memcpy(&value, &bits, sizeof(T));
      std::memcpy(&other, &more, sizeof(T));
      std::memcpy(&result, &old, sizeof(T));
      T changed = T(F{}(old, value, other));
      std::memcpy(cell, &changed, sizeof(T));
      w.set(i, k, l, result);
    }
  });
}

template <class Space, class T, class F>
void atomic(Warp& w, const Instruction& i, u32 lanes) {
  atomic_at<Space, T, F>(w, i, lanes, addresses(w, i, i.destinations, lanes, i.immediate[1]));
}
template <class T, class F>
void atomic_generic(Warp& w, const Instruction& i, u32 lanes) {
  by_space(w, addresses(w, i, i.destinations, lanes, i.immediate[1]), lanes,
           [&]<class Space>(Space, u32 some, const Addresses& a) {
             atomic_at<Space, T, F>(w, i, some, a);
           });
}

template <class T, class F>
void add_atomic(const std::string& name, F) {
  add_operation("atom.global." + name, atomic<Global, T, F>);
  add_operation("atom.shared." + name, atomic<Shared, T, F>);
  add_operation("atom.generic." + name, atomic_generic<T, F>);
}

template <class T>
void add_atomic_sum(const std::string& type) {
  add_atomic<T>("add." + type, [](T old, T a, T) { return T(old + a); });
}
template <class T>
void add_atomic_pair_sum(const std::string& type) {
  add_atomic<Pair<T>>("add." + type, [](Pair<T> old, Pair<T> a, Pair<T>) {
    return Pair<T>{T(old.low + a.low), T(old.high + a.high)};
  });
}
template <class T>
void add_atomic_order(const std::string& type) {
  add_atomic<T>("min." + type, [](T old, T a, T) { return std::min(old, a); });
  add_atomic<T>("max." + type, [](T old, T a, T) { return std::max(old, a); });
}
template <class T>
void add_atomic_bits(const std::string& type) {
  add_atomic<T>("and." + type, [](T old, T a, T) { return old & a; });
  add_atomic<T>("or." + type, [](T old, T a, T) { return old | a; });
  add_atomic<T>("xor." + type, [](T old, T a, T) { return old ^ a; });
  add_atomic<T>("exch." + type, [](T, T a, T) { return a; });
  add_atomic<T>("cas." + type, [](T old, T a, T b) { return old == a ? b : old; });
}

void add_atomics() {
  add_atomic_sum<u32>("u32");
  add_atomic_sum<u64>("u64");
  add_atomic_sum<float>("f32");
  add_atomic_sum<double>("f64");
  add_atomic_sum<f16>("f16");
  add_atomic_sum<bf16>("bf16");
  add_atomic_pair_sum<f16>("f16x2");
  add_atomic_pair_sum<bf16>("bf16x2");
  add_atomic_order<u32>("u32");
  add_atomic_order<s32>("s32");
  add_atomic_order<u64>("u64");
  add_atomic_order<s64>("s64");
  add_atomic_bits<u16>("u16");
  add_atomic_bits<u32>("u32");
  add_atomic_bits<u64>("u64");
}

// ------------------------------------------------------------------ cp.async

// Sources: shared address, global address, bytes to read (the rest is zero). immediate[0]: bytes to
// write, [1] and [2]: offsets. The copy is made as late as the program allows, at the wait.
void copy(Warp& w, const Instruction& i, u32 lanes) {
  const int bytes = i.immediate[0], pc = w.pc_of(i);
  Addresses to = addresses(w, i, 0, lanes, i.immediate[1]);
  Addresses from = addresses(w, i, 1, lanes, i.immediate[2]);
  u32 reading = 0;
  for_lanes(lanes, [&](int l) { reading |= u32(w.get(i, 2, l) != 0) << l; });
  Pointers sources{};
  // What it reads counts as 16 bytes even if fewer are wanted: Triton wants all or none.
  if (reading) sources = w.launch.global.request(w, pc, from.data(), reading, bytes, Access::read);
  for_lanes(lanes, [&](int l) {
    int wanted = int(w.get(i, 2, l));
    if (wanted > bytes) throw Fault("reads more bytes than it writes", l);
    w.launch.shared.check(to[l], bytes, l);
    w.launch.shared.begin_copy(w, pc, u32(to[l]), bytes);
    w.copies.push_back({u32(to[l]), sources[l], bytes, wanted, l, pc, w.copy_groups[l]});
  });
  if (w.launch.first_block) count_wavefronts(w.launch.counters[pc], to.data(), lanes, bytes);
}

void commit_copies(Warp& w, const Instruction&, u32 lanes) {
  for_lanes(lanes, [&](int l) { w.copy_groups[l]++; });
}

void land(Warp& w, const PendingCopy& copy) {
  u8* destination = w.launch.shared.at(copy.destination);
  std::memset(destination, 0, copy.bytes);
  if (copy.source_bytes) std::memcpy(destination, copy.source, copy.source_bytes);
  w.launch.shared.end_copy(w, copy.pc, copy.destination, copy.bytes);
}

// immediate[0]: how many of the newest groups may stay in flight.
void wait_copies(Warp& w, const Instruction& i, u32 lanes) {
  auto complete = [&](const PendingCopy& copy) {
    return lanes >> copy.lane & 1 && copy.group + i.immediate[0] < w.copy_groups[copy.lane];
  };
  for (const PendingCopy& copy : w.copies)
    if (complete(copy)) land(w, copy);
  std::erase_if(w.copies, complete);
}

void wait_all_copies(Warp& w, const Instruction& i, u32 lanes) {
  commit_copies(w, i, lanes);
  wait_copies(w, i, lanes);
}

}  // namespace

void add_memory() {
  add_operation("ld.global", load<Global>);
  add_operation("ld.shared", load<Shared>);
  add_operation("ld.generic", load_generic);
  add_operation("ld.param", load_parameter);
  add_operation("st.global", store<Global>);
  add_operation("st.shared", store<Shared>);
  add_operation("st.generic", store_generic);
  add_atomics();
  add_operation("cp.async", copy);
  add_operation("cp.async.commit_group", commit_copies);
  add_operation("cp.async.wait_group", wait_copies);
  add_operation("cp.async.wait_all", wait_all_copies);
}

}  // namespace ptx
