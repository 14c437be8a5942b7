#include "machine.h"

#include "launch.h"

namespace ptx {

std::vector<Operation>& operations() {
  static std::vector<Operation> table;
  return table;
}

void add_operation(std::string name, Handler handler, Flow flow, int operands) {
  operations().push_back({std::move(name), handler, flow, operands});
}

// ------------------------------------------------------------------ warps

Warp::Warp(Launch& l, Block& b, int i)
    : launch(l), block(b), index(i), live(lanes_at_start(l.threads(), i)) {
  const Program& program = l.program;
  registers.assign(program.initial_registers, program.initial_registers + program.register_bytes);
  in_flight.resize(program.register_bytes / 64);
  auto write = [&](s32 offset, auto value_of) {
    if (offset < 0) return;
    u32* values = reinterpret_cast<u32*>(registers.data() + offset);
    for (int lane = 0; lane < kLanes; lane++) values[lane] = u32(value_of(lane));
  };
  const s32* size = l.options.threads;
  for (int axis = 0; axis < 3; axis++) {
    int stride = axis == 0 ? 1 : axis == 1 ? size[0] : size[0] * size[1];
    write(program.special[axis], [&](int lane) { return thread(lane) / stride % size[axis]; });
    write(program.special[3 + axis], [&](int) { return size[axis]; });
    write(program.special[6 + axis], [&](int) { return b.id[axis]; });
    write(program.special[9 + axis], [&](int) { return l.options.grid[axis]; });
  }
  write(program.lane_id, [](int lane) { return lane; });
  write(program.warp_id, [&](int) { return index; });
}

const Operand& Warp::operand(const Instruction& i, int k) const {
  return launch.program.operands[i.first_operand + k];
}

int Warp::pc_of(const Instruction& i) const { return int(&i - launch.program.code); }

u64 Warp::get(const Instruction& i, int k, int lane) const {
  const Operand& o = operand(i, k);
  if (!o.bytes) return *reinterpret_cast<const u32*>(&registers[o.offset]) >> lane & 1;
  u64 bits = 0;
  std::memcpy(&bits, &registers[o.offset + lane * o.bytes], o.bytes);
  return bits;
}

void Warp::set(const Instruction& i, int k, int lane, u64 bits) {
  const Operand& o = operand(i, k);
  std::memcpy(&registers[o.offset + lane * o.bytes], &bits, o.bytes);
}

void Warp::store_pc(u32 lanes, u32 value) {
  for_lanes(lanes, [&](int lane) { pc[lane] = value; });
}

u32 Warp::guarded(const Instruction& i, u32 lanes) {
  if (i.guard < 0) return lanes;
  u32 guard = *reinterpret_cast<u32*>(&registers[i.guard]);
  return lanes & (i.guard_negated ? ~guard : guard);
}

int Warp::run(int turn) {
  int left = turn;
  while (left > 0 && runnable()) {
    u32 ready = live & ~waiting, lanes = 0;
    if (!ready) stuck();
    u32 first = ~0u, limit = ~0u;
    for_lanes(ready, [&](int lane) { first = std::min(first, pc[lane]); });
    for_lanes(ready, [&](int lane) {
      if (pc[lane] == first)
        lanes |= 1u << lane;
      else
        limit = std::min(limit, pc[lane]);
    });
    left = run_group(lanes, first, limit, left);
  }
  return turn - left;
}

// Lanes that have come to a collective instruction wait until all that it names are there. Returns
// those, or none while some are missing.
u32 Warp::gather(const Instruction& i, u32 at, u32 active) {
  u32 members = i.immediate[1] < 0 ? u32(i.immediate[0]) : 0;
  if (i.immediate[1] >= 0) members = u32(get(i, i.immediate[1], __builtin_ctz(active)));
  members &= lanes_at_start(launch.threads(), index);
  u32 arrived = active;
  for_lanes(waiting & live, [&](int lane) { arrived |= u32(pc[lane] == at) << lane; });
  if ((arrived & members) != members) {
    store_pc(active, at);
    waiting |= active;
    return 0;
  }
  waiting &= ~arrived;
  return members;
}

// Executes one instruction and returns the next. Lanes that no longer go on together, because they
// have exited, wait, or went different ways, are taken out of `lanes` and remembered.
u32 Warp::execute(const Instruction& i, u32 at, u32& lanes) {
  const Operation& operation = operations()[i.operation];
  const u32 active = guarded(i, lanes);
  if (!active) return at + 1;
  switch (operation.flow) {
    case Flow::next:
      operation.handler(*this, i, active);
      return at + 1;
    case Flow::branch:
      if (active == lanes) return u32(i.immediate[0]);
      store_pc(active, u32(i.immediate[0]));
      store_pc(lanes & ~active, at + 1);
      lanes = 0;
      return at + 1;
    case Flow::exit:
      live &= ~active;
      lanes &= ~active;
      if (!live) check_finished(*this);
      return at + 1;
    case Flow::warp:
    case Flow::barrier:
      break;
  }
  const u32 members = gather(i, at, active);
  if (members) {
    lanes |= members;
    operation.handler(*this, i, members);
  }
  if (!members || barrier >= 0) {
    store_pc(members ? lanes : lanes & ~active, at + 1);
    lanes = 0;
  }
  return at + 1;
}

// Runs lanes that are at the same instruction, until they part, stop, or come to `limit`, where
// others are. Returns what is left of the turn.
int Warp::run_group(u32 lanes, u32 at, u32 limit, int turn) try {
  for (; lanes && at < limit && turn > 0; turn--) {
    const Instruction& i = launch.program.code[at];
    launch.counters[at].executed++;
    if (registers_in_flight) check_in_flight(*this, i);
    at = execute(i, at, lanes);
  }
  store_pc(lanes, at);
  return turn;
} catch (Fault& fault) {
  if (fault.lane < 0) fault.lane = __builtin_ctz(lanes);
  fault.at(int(at), thread(fault.lane));
  throw;
}

void Warp::stuck() const {
  u32 exited = lanes_at_start(launch.threads(), index) & ~live;
  int lane = __builtin_ctz(live);
  std::string message = "divergent: lanes ";
  for_lanes(live,
            [&](int l) { message += l == lane ? std::to_string(l) : "," + std::to_string(l); });
  message += " of warp " + std::to_string(index) + " wait for others here";
  if (exited) message += " that have exited";
  throw Fault(message).at(int(pc[lane]), thread(lane));
}

// ------------------------------------------------------------------ blocks

Block::Block(Launch& l, s32 n) : launch(l), number(n) {
  const s32* grid = l.options.grid;
  id[0] = n % grid[0];
  id[1] = n / grid[0] % grid[1];
  id[2] = n / grid[0] / grid[1];
  int warps_needed = (l.threads() + kLanes - 1) / kLanes;
  for (int w = 0; w < warps_needed; w++) warps.push_back(std::make_unique<Warp>(l, *this, w));
}

void Block::arrive(Warp& warp, int barrier, int expected) {
  warp.barrier = barrier;
  arrived[barrier] += kLanes;
  if (arrived[barrier] < (expected + kLanes - 1) / kLanes * kLanes) return;
  arrived[barrier] = 0;
  std::vector<int> released;
  for (auto& other : warps)
    if (other->barrier == barrier) {
      other->barrier = -1;
      released.push_back(other->index);
    }
  launch.shared.synchronise(released);
}

void Block::deadlock() const {
  std::string message = "deadlock at a barrier:";
  const Warp* waiting = nullptr;
  for (auto& warp : warps) {
    message += " warp " + std::to_string(warp->index);
    message += warp->done() ? " has exited," : " waits at " + std::to_string(warp->barrier) + ",";
    if (!warp->done()) waiting = warp.get();
  }
  message.back() = ' ';
  int lane = __builtin_ctz(waiting->live);
  throw Fault(message + "the last one here").at(int(waiting->pc[lane]) - 1, waiting->thread(lane));
}

void Block::run() {
  constexpr int kLongTurn = 1 << 14;  // bounded: a warp may spin on what another one holds
  const bool shuffled = launch.options.seed >= 0;
  u64 executed = 0;
  std::vector<Warp*> runnable;
  auto done = [](const auto& warp) { return warp->done(); };
  while (!std::all_of(warps.begin(), warps.end(), done)) {
    runnable.clear();
    for (auto& warp : warps)
      if (warp->runnable()) runnable.push_back(warp.get());
    if (runnable.empty()) deadlock();
    // Either one warp for a few instructions, or each of them as far as it gets.
    if (shuffled)
      executed += runnable[launch.random() % runnable.size()]->run(1 + int(launch.random() % 64));
    else
      for (Warp* warp : runnable) executed += warp->run(kLongTurn);
    if (executed > launch.options.max_instructions)
      throw Fault("no end after " + std::to_string(executed) +
                  " instructions; does it wait for another block?");
  }
}

// ------------------------------------------------------------------ launches

Launch::Launch(const Program& p, const Options& o, const u8* params, std::vector<Range> ranges,
               Counters* c)
    : program(p),
      options(o),
      parameters(params),
      counters(c),
      global(*this, std::move(ranges), o.check_blocks),
      shared(*this, o.shared_bytes, o.check_races),
      random(u32(o.seed)) {}

void Launch::run() {
  std::vector<s32> numbers(size_t(options.grid[0]) * options.grid[1] * options.grid[2]);
  for (size_t n = 0; n < numbers.size(); n++) numbers[n] = s32(n);
  if (options.seed >= 0) std::shuffle(numbers.begin(), numbers.end(), random);
  for (s32 number : numbers) {
    block = std::make_unique<Block>(*this, number);
    shared.begin_block();
    block->run();
    first_block = false;
  }
}

void Launch::find(const Warp& warp, Finding finding) {
  if (finding.hazard != Hazard::blocks && !options.check_races) return;
  for (Finding& f : findings)
    if (f.hazard == finding.hazard && f.pc == finding.pc && f.other_pc == finding.other_pc) {
      f.count++;
      return;
    }
  finding.warp = warp.index;
  std::copy_n(block->id, 3, finding.block);
  findings.push_back(finding);
}

}  // namespace ptx
