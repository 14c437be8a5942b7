#include "segments.h"

namespace lol {
namespace LOL_ISA {
namespace {

// A segment keeps sums of its own for the parameters' gradients, 32 KiB for a head with D = f = 64,
// and for the keys of the windows that reach into it: a tenth of what q, k, v and do take, at most.
constexpr int64_t SEGMENT = 512;
constexpr int64_t WINDOWS = 4;

// Borders cost a fifth of a backward pass: they pay where single threads would leave more of the
// machine idle while the last of them is at work.
constexpr double IDLE = 0.2;

}  // namespace

Segments::Segments(const Problem& p, const Batch& batch)
    : window_(p.window), sequences_(batch.sequences), sink_(p.window.sink) {
  entries_ = p.q.shape[0];
  length_ = p.q.shape[2];
  for (int64_t i = 0; i < batch.count; i++)
    longest_ = at_least(longest_, batch.sequences[i].tokens);
  const int64_t span = window_span(at_most(p.window.size, length_), p.window.kind);
  const int64_t least = at_least(SEGMENT, WINDOWS * (span + at_most(sink_, length_)));
  tokens_ = (least + BLOCK - 1) / BLOCK * BLOCK;
  more_ = at_most(sink_, length_) + BLOCK + (tokens_ < length_ ? span : 0);
  places_ = length_ / tokens_ + (entries_ == 1 ? batch.count : 1) + 1;
}

int64_t Segments::place(const Sequence& s, int64_t j) const {
  // Packed sequences follow one another: each begins at least one place after the one before.
  const int64_t before = entries_ == 1 ? first_of(s) / tokens_ + (&s - sequences_) : 0;
  return s.batch * places_ + before + j;
}

int64_t runs_by_segments(const Segments& segments, const Problem& p, const Batch& batch,
                         int64_t runs) {
  int64_t count = 0;
  for (int64_t i = 0; i < batch.count; i++) count += segments.count(batch.sequences[i]);
  const int threads = thread_count(count * p.state_heads(), p.work(batch.real_tokens));
  return count > batch.count ? left_over(runs, threads, IDLE) : 0;
}

void states_before(const Problem& p, const Segments& segments, const Sequence& s,
                   int64_t state_head, StateSums initial, const SegmentStates& to, Arena arena) {
  Problem keys_once = p;
  keys_once.both_ways = false;
  const int64_t head = p.kv_head_of(state_head);
  Chunkwise c(keys_once, state_head, s.tokens, tokens_of(p.k, s, head), tokens_of(p.v, s, head),
              arena, Along::nothing);
  if (initial.kv) c.load_state(initial.kv, initial.ksum, 0);
  for (int64_t j = 1; j < segments.count(s); j++) {
    const Segment before = segments.at(s, j - 1);
    for (int64_t first = before.begin; first < before.end; first += BLOCK)
      c.fold(p.window.start(first));
    const StateSums sums = to.at(s, j, state_head);
    c.store_state(sums.kv, sums.ksum, {0, p.F()});
  }
}

int64_t folded_before(const Problem& p, const Segment& g) {
  return g.begin ? at_least(p.window.start(g.begin - BLOCK), p.window.sink) : p.window.sink;
}

}  // namespace LOL_ISA
}  // namespace lol
