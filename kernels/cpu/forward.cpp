#include "forward.h"

namespace lol {
namespace LOL_ISA {
namespace {

// A team costs a tenth in barriers and copies: it pays where single threads would leave more of the
// machine idle,
constexpr double IDLE = 0.15;
// and where each thread has a stretch of this many blocks of queries. Fewer make barriers felt;
// more push tiles and copies of the state out of L2.
constexpr int64_t BLOCKS = 16;

class Pass {
 public:
  Pass(const Problem& p, const Run& run, const Outputs& out, Arena& arena)
      : p_(p), run_(run), out_(out), c(p, run.state_head, run.total, run.k, run.v, arena) {}

  void load_state() {
    if (run_.kv) c.load_state(run_.kv, run_.ksum, run_.folded);
  }

  // Blocks fold further than the final state may hold when some of it must stay revocable: it is
  // copied on the way.
  void fold(int64_t end, Features part) {
    if (!stored_ && run_.final_kv && end >= run_.fold) {
      c.fold(run_.fold, part);
      c.store_state(run_.final_kv, run_.final_ksum, part);
      stored_ = true;
    }
    c.fold(end, part);
  }
  void finish(Features part) {
    if (run_.final_kv) fold(at_least(run_.fold, c.state.folded), part);
  }

  void attend(int64_t h, int64_t first) {
    const int64_t n = at_most(BLOCK, run_.total - first), T = out_.o.shape[2];
    const Sequence& s = *run_.sequence;
    Tokens from = tokens_of(p_.q, s, h), to = tokens_of(out_.o, s, h);
    from.past = to.past = run_.past;
    const Queries block = c.load_queries(h, first, n, from, p_.lambda(h));
    const Sums& sums = c.attend(block, h);
    store_rows(to, first, n, sums.y);
    const int64_t ahead = at_most(BLOCK, run_.total - first - n);
    prefetch_rows(from, first + n, ahead);
    prefetch_rows(to, first + n, ahead);
    const int64_t row0 = (s.batch * p_.heads() + h) * T;
    for (int64_t i = 0; i < n; i++) {
      const int64_t row = row0 + s.row(first + i - run_.past);
      if (out_.m) out_.m[row] = sums.m[i];
      if (out_.den) out_.den[row] = sums.den[i];
    }
  }

 private:
  const Problem& p_;
  const Run& run_;
  const Outputs& out_;
  bool stored_ = false;

 public:
  Chunkwise c;
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
    pass.fold(p.window.start(first), all);
    for (int64_t h = h0; h < h0 + p.group(); h++) pass.attend(h, first);
  }
  pass.finish(all);
}

int Team::threads_for(const Problem& p, const Batch& batch) {
  const int64_t runs = batch.count * p.state_heads();
  const int threads = thread_count(batch.real_tokens / BLOCK, p.work(batch.real_tokens));
  if (runs == 0 || batch.real_tokens / batch.count < BLOCKS * BLOCK * threads) return 0;
  const int64_t rounds = (runs + threads - 1) / threads;
  return (double)runs / (double)(rounds * threads) < 1.0 - IDLE ? threads : 0;
}

Team::Team(const Problem& p, int threads)
    : p_(p),
      threads_(threads),
      blocks_(BLOCKS * threads),
      tiles_(blocks_ + KeyTiles::for_window(p)),
      own_((Chunkwise::floats(p) + 1023) / 1024 * 1024 + 1024),
      memory_(threads * own_ + tiles_ * (KeyTiles::tile_floats(p) + 64) +
              blocks_ * (State::floats(p.F(), p.V()) + 32) +
              (tiles_ * sizeof(KeyTile) + blocks_ * sizeof(State)) / sizeof(float) +
              2 * Shares::floats(threads) + 64) {}

void Team::forward(const Run& run, const Outputs& out) {
  Arena shared{memory_.data + threads_ * own_};
  KeyTile* tiles = (KeyTile*)shared.take(tiles_ * sizeof(KeyTile) / sizeof(float));
  State* states = (State*)shared.take(blocks_ * sizeof(State) / sizeof(float));
  for (int64_t i = 0; i < tiles_; i++) tiles[i] = KeyTiles::make_tile(p_, shared);
  for (int64_t j = 0; j < blocks_; j++)
    states[j] = {shared.take(p_.F() * padded(p_.V())), shared.take(p_.F()), 0, true};
  const int64_t group = p_.group(), h0 = run.state_head * group, F = p_.F(), ld = padded(p_.V());
  Meeting meeting;
  Shares tile_shares(threads_, shared.take(Shares::floats(threads_)));
  Shares task_shares(threads_, shared.take(Shares::floats(threads_)));
#ifdef _OPENMP
#pragma omp parallel num_threads(threads_)
#endif
  {
    const MatrixUnit unit{};
    const int64_t t = thread_index();
    Arena arena{memory_.data + t * own_};
    Pass pass(p_, run, out, arena);
    pass.load_state();
    const int threads = team_size();
    const auto row = [&](int64_t i) {
      return i == threads ? F : F * i / threads / ROW_GROUP * ROW_GROUP;
    };
    const Features part = {row(t), row(t + 1)};
    for (int64_t begin = run.past; begin < run.total; begin += blocks_ * BLOCK) {
      const int64_t blocks = at_most(blocks_, (run.total - begin + BLOCK - 1) / BLOCK);
      const int64_t last = begin + (blocks - 1) * BLOCK;
      // Tiles start where the later blocks will ask for them.
      const int64_t folded = pass.c.state.folded;
      const int64_t base = folded + (at_least(p_.window.start(last), folded) - folded) % BLOCK;
      const int64_t end = at_most(last + BLOCK, run.total);
      const int64_t count = at_most(tiles_, (end - base + BLOCK - 1) / BLOCK);
      const int64_t linear_end = p_.window.start(end - 1);
      pass.c.tiles.share(nullptr, 0, 0);
      for (int64_t i; (i = tile_shares.next(t, count)) >= 0;) {
        pass.c.tiles.load(tiles[i], base + i * BLOCK, run.total);
        if (base + i * BLOCK < linear_end) pass.c.tiles.phi(tiles[i]);
      }
      meeting.wait();
      pass.c.tiles.share(tiles, base, count);
      if (t == 0) task_shares.restart();
      for (int64_t j = 0; j < blocks; j++) {
        pass.fold(p_.window.start(begin + j * BLOCK), part);
        const State& now = pass.c.state;
        memcpy(states[j].kv + part.begin * ld, now.kv + part.begin * ld,
               sizeof(float) * (part.end - part.begin) * ld);
        memcpy(states[j].ksum + part.begin, now.ksum + part.begin,
               sizeof(float) * (part.end - part.begin));
        if (t == 0) states[j].folded = now.folded, states[j].empty = now.empty;
      }
      const State mine = pass.c.state;
      meeting.wait();
      if (t == 0) tile_shares.restart();
      for (int64_t task; (task = task_shares.next(t, blocks * group)) >= 0;) {
        pass.c.state = states[task / group];
        pass.attend(h0 + task % group, begin + task / group * BLOCK);
      }
      pass.c.state = mine;
      meeting.wait();
    }
    pass.c.tiles.share(nullptr, 0, 0);
    pass.finish(part);
  }
}

}  // namespace LOL_ISA
}  // namespace lol
