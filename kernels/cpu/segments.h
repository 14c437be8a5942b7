// Long sequences in segments. Sums over tokens (gradients of parameters and keys, losses) are taken
// within each segment first and then over the segments, in order: threads can share a sequence,
// and no bit tells whether they did.
#pragma once
#include "chunkwise.h"
#include "parallel.h"

namespace lol {
namespace LOL_ISA {

struct Segment {
  int64_t index, begin, end;  // the queries [begin, end)
};

class Segments {
 public:
  Segments(const Problem& p, const Batch& batch);
  int64_t count(const Sequence& s) const { return at_least((s.tokens + tokens_ - 1) / tokens_, 1); }
  int64_t most() const { return at_least((longest_ + tokens_ - 1) / tokens_, 1); }
  Segment at(const Sequence& s, int64_t j) const {
    return {j, j * tokens_, at_most((j + 1) * tokens_, s.tokens)};
  }
  // Where a segment is in an array with an entry for each, and how many entries that has.
  int64_t place(const Sequence& s, int64_t j) const;
  int64_t places() const { return entries_ * places_; }
  // The same of rows for the keys that a segment's queries attend by softmax: those of the sinks,
  // then from first_key on, and one more tile. A sequence has its segments' one after the other, an
  // array those of all sequences.
  int64_t row(const Sequence& s) const {
    return s.batch * length_ + first_of(s) + more_ * place(s, 0);
  }
  int64_t row_in_sequence(int64_t j) const { return j * (tokens_ + more_); }
  int64_t rows() const { return entries_ * length_ + more_ * places(); }
  int64_t rows_of_longest() const { return longest_ + more_ * (longest_ / tokens_ + 1); }
  int64_t rows_of(const Segment& g) const { return sink_ + g.end - first_key(g) + BLOCK; }
  int64_t first_key(const Segment& g) const {
    return g.begin ? at_most(window_.start(g.begin), g.begin) : sink_;
  }
  int64_t sinks() const { return sink_; }

 private:
  int64_t first_of(const Sequence& s) const { return s.index ? 0 : s.first; }

  Window window_;
  const Sequence* sequences_;
  int64_t sink_, tokens_, more_;  // more_: rows of a segment beyond its tokens
  int64_t entries_, length_, places_;
  int64_t longest_ = 0;  // of the sequences, in tokens
};

// Sums as callers lay them out: [F x V] and [F]; either may be null.
struct StateSums {
  float *kv, *ksum;
  static int64_t floats(const Problem& p) { return p.F() * (p.V() + 1) + 16; }
  static StateSums take(const Problem& p, Arena& arena) {
    return {arena.take(p.F() * p.V()), arena.take(p.F())};
  }
  // Those of a sequence and state head in tensors [N, Hs, F, V] and [N, Hs, F].
  static StateSums of(const Problem& p, const float* kv, const float* ksum, const Sequence& s,
                      int64_t state_head) {
    const int64_t at = s.slot * p.state_heads() + state_head;
    return {kv ? (float*)kv + at * p.F() * p.V() : nullptr,
            ksum ? (float*)ksum + at * p.F() : nullptr};
  }
};

// Sums for every segment and state head.
class SegmentStates {
 public:
  SegmentStates(const Problem& p, const Segments& segments, bool wanted)
      : p_(p),
        segments_(segments),
        memory_(wanted ? segments.places() * p.state_heads() * size() : 0) {}
  bool ok() const { return memory_.ok(); }
  StateSums at(const Sequence& s, int64_t j, int64_t state_head) const {
    float* kv = memory_.data + (state_head * segments_.places() + segments_.place(s, j)) * size();
    return {kv, kv + p_.F() * p_.V()};
  }

 private:
  int64_t size() const { return p_.F() * (p_.V() + 1); }

  const Problem& p_;
  const Segments& segments_;
  Buffer memory_;
};

// Of how many of so many runs, the last ones, threads should share the segments, since they are too
// few for all of them. What a segment starts from has to be found first.
int64_t runs_by_segments(const Segments& segments, const Problem& p, const Batch& batch,
                         int64_t runs);

// The state before the queries of every segment but the first.
void states_before(const Problem& p, const Segments& segments, const Sequence& s,
                   int64_t state_head, StateSums initial, const SegmentStates& to, Arena arena);
// The keys that this state holds are those before this position.
int64_t folded_before(const Problem& p, const Segment& g);

}  // namespace LOL_ISA
}  // namespace lol
