#include "forward.h"

namespace lol {
namespace LOL_ISA {
namespace {

// A team costs a tenth in keys that two stretches load and in states that come from L2: it pays
// where single threads would leave more of the machine idle while the last of them is at work,
constexpr double IDLE = 0.15;
// and where each thread has a stretch of this many blocks of queries. Fewer load more keys twice;
// more push tiles and states out of L2.
constexpr int64_t BLOCKS = 16;

// The rows of a state in parts, each of which goes from stretch to stretch on its own. Folding is a
// quarter of a stretch's work: once all threads are at work, none waits with a part for every four
// of them, and half as many as threads let them come to that soon. Threads beyond 64 wait.
constexpr int MOST_PARTS = 16;
int parts_for(int threads) { return (int)at_most(at_least(threads / 2, 1), MOST_PARTS); }

class Pass {
 public:
  Pass(const Problem& p, const Run& run, const Outputs& out, Arena& arena)
      : p_(p),
        run_(run),
        out_(out),
        pace_(p.pace()),
        c(p, run.state_head, run.total, run.k, run.v, arena) {}

  void load_state() {
    if (run_.kv) c.load_state(run_.kv, run_.ksum, run_.folded);
  }

  // To where the blocks before `first` have folded and stored; kv and ksum are the caller's to
  // bring.
  void resume(int64_t first) {
    const int64_t sink = p_.window.sink;
    const int64_t end = first > run_.past ? p_.window.start(first - BLOCK) : 0;
    c.state.folded = at_least(run_.kv ? at_least(run_.folded, sink) : sink, end);
    c.state.empty = !run_.kv && c.state.folded == sink;
    stored_ = run_.final_kv && first > run_.past && end >= run_.fold;
  }

  // As Chunkwise::fold(). Blocks fold further than the final state may hold when some of it must
  // stay revocable: it is copied on the way.
  void fold(int64_t end, Features part, const State& to) {
    if (!stored_ && run_.final_kv && end >= run_.fold) {
      c.fold(run_.fold, part, to);
      c.store_state(run_.final_kv, run_.final_ksum, part);
      stored_ = true;
    }
    c.fold(end, part, to);
  }
  void finish(Features part, const State& to) {
    if (run_.final_kv) fold(at_least(run_.fold, c.state.folded), part, to);
  }

  void attend(int64_t h, int64_t first) {
    const int64_t n = at_most(BLOCK, run_.total - first);
    const Sequence& s = *run_.sequence;
    Tokens from = tokens_of(p_.q, s, h), to = tokens_of(out_.o, s, h);
    from.past = to.past = run_.past;
    const int64_t ahead = at_most(BLOCK, run_.total - first - n);
    request_rows(from, first + n, ahead);
    request_rows(to, first + n, ahead);
    const Queries block = c.load_queries(h, first, n, from, p_.lambda(h));
    const Sums& sums = c.attend(block, h);
    store_rows(to, first, n, sums.y);
    const int64_t row0 = p_.statistics_of(s, h);
    const auto store_statistic = [&](float* to, const float* of) {
      if (!to) return;
      if (!s.index) memcpy(to + row0 + s.row(first - run_.past), of, sizeof(float) * (size_t)n);
      for (int64_t i = 0; s.index && i < n; i++) to[row0 + s.row(first + i - run_.past)] = of[i];
    };
    store_statistic(out_.m, sums.m);
    store_statistic(out_.den, sums.den);
  }

 private:
  const Problem& p_;
  const Run& run_;
  const Outputs& out_;
  const Pace pace_;
  bool stored_ = false;

 public:
  Chunkwise c;
};

void copy_rows(float* to, const float* from, int64_t width, Features part) {
  const int64_t at = part.begin * width;
  memcpy(to + at, from + at, sizeof(float) * (size_t)((part.end - part.begin) * width));
}
void copy(const State& to, const State& from, int64_t ld, Features part) {
  copy_rows(to.kv, from.kv, ld, part);
  copy_rows(to.ksum, from.ksum, 1, part);
}
// A place for sums.
State take_state(const Problem& p, Arena& arena) {
  float* kv = arena.take(p.F() * padded(p.V()));
  return {kv, arena.take(p.F()), kv, 0, true};
}

// One thread of a team, at one stretch of queries after the other.
class Member {
 public:
  static int64_t floats(const Problem& p) {
    return Chunkwise::floats(p) + tiles(p) * (KeyTiles::tile_floats(p) + 64) +
           (BLOCKS + 1) * (State::floats(p.F(), p.V()) + 32) +
           (int64_t)(tiles(p) * sizeof(KeyTile) / sizeof(float)) + 1024;
  }

  Member(const Problem& p, const Run& run, const Outputs& out, Arena arena)
      : p_(p),
        run_(run),
        ld_(padded(p.V())),
        pass_(p, run, out, arena),
        state_(pass_.c.state),
        own_(state_) {
    tiles_ = (KeyTile*)arena.take(tiles(p) * sizeof(KeyTile) / sizeof(float));
    for (int64_t i = 0; i < tiles(p); i++) tiles_[i] = KeyTiles::make_tile(p, arena);
    for (State& place : places_) {
      place = take_state(p, arena);
      if (p.format != Format::f32) place.kv = own_.kv;  // of which pairs are read
    }
  }

  // Turns to the queries [first, end), and loads keys with their features.
  void begin(int64_t first, int64_t end) {
    first_ = first;
    end_ = end;
    blocks_ = (end - first + BLOCK - 1) / BLOCK;
    state_ = own_;
    if (first == run_.past) pass_.load_state();
    pass_.resume(first);
    // Tiles start where the later blocks will ask for them.
    const int64_t folded = state_.folded, last = position(blocks_ - 1);
    const int64_t base = folded + (at_least(p_.window.start(last), folded) - folded) % BLOCK;
    const int64_t count = at_most(tiles(p_), (end - base + BLOCK - 1) / BLOCK);
    KeyTiles& keys = pass_.c.tiles;
    for (int64_t i = 0; i < count; i++) {
      keys.load(tiles_[i], base + i * BLOCK, run_.total);
      if (base + i * BLOCK < p_.window.start(end - 1)) keys.phi(tiles_[i]);
    }
    keys.hold(tiles_, base, count);
  }

  // Takes part of the state from `handed`, which the stretch before has left there, through the
  // stretch, from place to place, to the next one or, after the last one, into the final state.
  void fold(Features part, const State& handed) {
    state_ = own_;
    if (first_ != run_.past) {
      copy(state_, handed, ld_, part);
      pass_.c.keep_readable(part);
    }
    pass_.resume(first_);  // each part folds the same keys
    for (int64_t j = 0; j < blocks_; j++) {
      pass_.fold(p_.window.start(position(j)), part, places_[j]);
      before_[j] = state_;
    }
    if (end_ < run_.total) {
      copy(handed, state_, ld_, part);
    } else {
      pass_.finish(part, places_[BLOCKS]);
    }
  }

  void attend() {
    const int64_t group = p_.group(), h0 = run_.state_head * group;
    for (int64_t j = 0; j < blocks_; j++) {
      state_ = before_[j];
      for (int64_t h = h0; h < h0 + group; h++) pass_.attend(h, position(j));
    }
  }

 private:
  // That a stretch holds.
  static int64_t tiles(const Problem& p) { return BLOCKS + KeyTiles::for_window(p); }
  int64_t position(int64_t block) const { return first_ + block * BLOCK; }

  const Problem& p_;
  const Run& run_;
  const int64_t ld_;
  Pass pass_;
  State& state_;
  const State own_;  // where it starts from
  KeyTile* tiles_;
  State places_[BLOCKS + 1];  // [j]: where block j folds the state to; the last: the final state
  State before_[BLOCKS];      // [j]: what block j reads, in the place of the last block that folded
  int64_t first_, end_, blocks_;
};

}  // namespace

void clear_padding(const Batch& batch, const lol_tensor& o, float* m, float* den) {
  if (!batch.padded) return;
  const int64_t rows = o.shape[0] * o.shape[1] * o.shape[2];
  clear(o);
  if (m) fill(m, rows, 0.0f);
  if (den) fill(den, rows, 1.0f);
}

void forward(const Problem& p, const Run& run, const Outputs& out, Arena arena) {
  Pass pass(p, run, out, arena);
  const Features all = {0, p.F()};
  const int64_t h0 = run.state_head * p.group();
  pass.load_state();
  for (int64_t first = run.past; first < run.total; first += BLOCK) {
    pass.fold(p.window.start(first), all, pass.c.state);
    for (int64_t h = h0; h < h0 + p.group(); h++) pass.attend(h, first);
  }
  pass.finish(all, pass.c.state);
}

int Team::threads_for(const Problem& p, const Batch& batch) {
  return thread_count(batch.real_tokens / BLOCK, p.work(batch.real_tokens));
}

int64_t Team::share_of(int64_t runs, const Problem& p, const Batch& batch) {
  const int threads = threads_for(p, batch);
  if (runs == 0 || batch.real_tokens / batch.count < BLOCKS * BLOCK * threads) return 0;
  return left_over(runs, threads, IDLE);
}

Team::Team(const Problem& p, int threads)
    : p_(p),
      threads_(threads),
      member_((Member::floats(p) + 1023) / 1024 * 1024),
      memory_(threads ? threads * member_ + State::floats(p.F(), p.V()) + 32 : 0) {}

void Team::forward(const Run& run, const Outputs& out) {
  const int64_t blocks = (run.total - run.past + BLOCK - 1) / BLOCK;
  // A sequence without tokens still has a final state.
  if (blocks == 0) return LOL_ISA::forward(p_, run, out, Arena{memory_.data});
  // Stretches of the same length, as many for each thread.
  const int64_t rounds = (blocks + threads_ * BLOCKS - 1) / (threads_ * BLOCKS);
  const int64_t length = (blocks + threads_ * rounds - 1) / (threads_ * rounds) * BLOCK;
  const int64_t F = p_.F();
  Arena shared{memory_.data + threads_ * member_};
  const State handed = take_state(p_, shared);
  const int parts = parts_for(threads_);
  const auto row = [&](int64_t part) {
    return part == parts ? F : F * part / parts / ROW_GROUP * ROW_GROUP;
  };
  Turns turns[MOST_PARTS];
  int64_t begun = 0;
  const FloatMode mode = float_mode();
#ifdef _OPENMP
#pragma omp parallel num_threads(threads_)
#endif
  {
    const AsCaller computing(mode);
    [[maybe_unused]] const MatrixUnit unit{};
    Member member(p_, run, out, Arena{memory_.data + thread_index() * member_});
    for (;;) {
      const int64_t stretch = __atomic_fetch_add(&begun, 1, __ATOMIC_RELAXED);
      const int64_t first = run.past + stretch * length;
      if (first >= run.total) break;
      member.begin(first, at_most(first + length, run.total));
      for (int i = 0; i < parts; i++) {
        turns[i].wait_for(stretch);
        member.fold({row(i), row(i + 1)}, handed);
        turns[i].pass_on();
      }
      member.attend();
    }
  }
}

}  // namespace LOL_ISA
}  // namespace lol
