#include "backward.h"

#include "backward_pass.h"

namespace lol {
namespace LOL_ISA {
namespace {

// The parts of dk and dv that the segments of a sequence have, for one state head.
struct KeyParts {
  float *dk, *dv;
};

// One call: its segments, its scratch, and the runs that both ways of sharing it out consist of.
class Backward {
 public:
  Backward(const BackwardProblem& b, const Batch& batch, const Segments& segments,
           const ParameterPartials& partials, bool parts_of_thread)
      : b_(b),
        p_(b.p),
        batch_(batch),
        segments_(segments),
        partials_(partials),
        parts_of_thread_(parts_of_thread),
        dk_(part_rows() * padded(p_.D())),
        dv_(part_rows() * padded(p_.V())),
        delta_(has_delta() ? 0 : p_.q.shape[0] * p_.heads() * p_.q.shape[2]) {}
  bool ok() const { return dk_.ok() && dv_.ok() && delta_.ok(); }

  // Threads take groups of sequences, each from its first segment to the last and back.
  int by_sequences() {
    const int64_t rows = parts_of_thread_ && wants_inputs() ? segments_.rows_of_longest() : 0;
    const int64_t floats =
        scratch() + StateSums::floats(p_) + rows * (padded(p_.D()) + padded(p_.V()));
    const auto work = [&](int64_t w, Arena arena) {
      const int64_t group = w / p_.state_heads(), head = w % p_.state_heads();
      const StateSums carried = StateSums::take(p_, arena), nothing = {};
      const KeyParts own = {arena.take(rows * padded(p_.D())), arena.take(rows * padded(p_.V()))};
      for (int64_t i = partials_.begin(group); i < partials_.end(group); i++) {
        const Sequence& s = batch_.sequences[i];
        const int64_t last = segments_.count(s) - 1;
        const KeyParts parts = parts_of_thread_ ? own : parts_of(s, head);
        for (int64_t j = 0; j <= last; j++)
          backward_of_queries(run_of(s, head, partials_.slot(group, j), j, parts),
                              j ? carried : initial(s, head), j < last ? carried : nothing, arena);
        for (int64_t j = last; j >= 0; j--) {
          backward_of_keys(run_of(s, head, partials_.slot(group, j), j, parts),
                           j < last ? carried : final_gradient(s, head),
                           j ? carried : initial_gradient(s, head), arena);
          // While they are near, and since the next head's come in their place.
          if (parts_of_thread_) store_keys(s, head, j, parts, 1);
        }
      }
    };
    return finish(run_workers(partials_.groups() * p_.state_heads(), floats, all_work(), work,
                              [&] { clear_padded(); }));
  }

  // Threads take segments, once the states at their borders are known, and the states' gradients:
  // at the same time, unless these wait for the delta that the queries' pass corrects.
  int by_segments() {
    const int64_t Hs = p_.state_heads(), heads = batch_.count * Hs, slots = partials_.slots() * Hs;
    const int threads = thread_count(at_least(2 * heads, slots), all_work());
    const SegmentStates before(p_, segments_), after(p_, segments_);
    const Arenas arenas(threads, scratch());
    if (!before.ok() || !after.ok() || !arenas.ok()) return LOL_ENOMEM;
    clear_padded();
    const auto share = [&](int64_t workers, const auto& work) {
      run_workers(arenas, (int)at_most(threads, workers), workers, work);
    };
    const bool waits = b_.corrects_delta();
    const auto sequence_of = [&](int64_t w) -> const Sequence& { return batch_.sequences[w / Hs]; };
    const auto states = [&](int64_t w, Arena arena) {
      const Sequence& s = sequence_of(w);
      states_before(p_, segments_, s, w % Hs, initial(s, w % Hs), before, arena);
    };
    const auto gradients = [&](int64_t w, Arena arena) {
      const Sequence& s = sequence_of(w);
      BackwardRun run = run_of(s, w % Hs, 0, 0, {});
      if (waits) run.new_delta = nullptr;
      gradients_after(run, segments_, final_gradient(s, w % Hs), after, arena);
    };
    const auto of_queries = [&](const BackwardRun& run, int64_t j, Arena arena) {
      const int64_t head = run.state_head;
      backward_of_queries(run, j ? before.at(run.s, j, head) : initial(run.s, head), {}, arena);
    };
    const auto of_keys = [&](const BackwardRun& run, int64_t j, Arena arena) {
      const int64_t head = run.state_head, last = segments_.count(run.s) - 1;
      backward_of_keys(run, j < last ? after.at(run.s, j, head) : final_gradient(run.s, head),
                       j ? StateSums{} : initial_gradient(run.s, head), arena);
    };
    const auto each_segment = [&](const auto& work) {
      share(slots, [&](int64_t w, Arena arena) { segments_of_slot(w, work, arena); });
    };
    if (waits) {
      share(heads, states);
      each_segment(of_queries);
      share(heads, gradients);
      each_segment(of_keys);
    } else {
      share(2 * heads, [&](int64_t w, Arena arena) {
        w % 2 ? gradients(w / 2, arena) : states(w / 2, arena);
      });
      const auto both = [&](const BackwardRun& run, int64_t j, Arena arena) {
        of_queries(run, j, arena);
        of_keys(run, j, arena);
      };
      each_segment(both);
    }
    return finish(LOL_OK);
  }

 private:
  // work(run, segment, arena) for the segments of a slot: worker w has one, for a state head.
  template <class Work>
  void segments_of_slot(int64_t w, const Work& work, Arena arena) const {
    const int64_t Hs = p_.state_heads(), slot = w / Hs, group = partials_.group_of(slot);
    const int64_t j = partials_.segment_of(slot);
    for (int64_t i = partials_.begin(group); i < partials_.end(group); i++) {
      const Sequence& s = batch_.sequences[i];
      if (j < segments_.count(s)) work(run_of(s, w % Hs, slot, j, parts_of(s, w % Hs)), j, arena);
    }
  }

  bool wants_inputs() const { return b_.dq.data != nullptr; }
  bool has_delta() const { return b_.delta || !p_.normalize; }
  int64_t all_work() const { return 3 * p_.work(batch_.real_tokens); }
  int64_t scratch() const {
    return at_least(backward_of_queries_floats(p_), backward_of_keys_floats(p_));
  }
  StateSums initial(const Sequence& s, int64_t head) const {
    return StateSums::of(p_, b_.kv0, b_.ksum0, s, head);
  }
  StateSums initial_gradient(const Sequence& s, int64_t head) const {
    return StateSums::of(p_, b_.dkv0, b_.dksum0, s, head);
  }
  StateSums final_gradient(const Sequence& s, int64_t head) const {
    return StateSums::of(p_, b_.dkv, b_.dksum, s, head);
  }
  int64_t part_rows() const {
    return wants_inputs() && !parts_of_thread_ ? segments_.rows() * p_.state_heads() : 0;
  }
  KeyParts parts_of(const Sequence& s, int64_t head) const {
    const int64_t row = head * segments_.rows() + segments_.row(s);
    if (part_rows() == 0) return {};
    return {dk_.data + row * padded(p_.D()), dv_.data + row * padded(p_.V())};
  }

  BackwardRun run_of(const Sequence& s, int64_t head, int64_t slot, int64_t j,
                     KeyParts parts) const {
    const Segment segment = segments_.at(s, j);
    const int64_t row = segments_.row_in_sequence(j);
    BackwardRun run = {b_, p_, s, partials_, head, slot, segment};
    run.sinks = segments_.sinks();
    run.first_key = segments_.first_key(segment);
    run.rows = segments_.rows_of(segment);
    run.dk = parts.dk ? parts.dk + row * padded(p_.D()) : nullptr;
    run.dv = parts.dv ? parts.dv + row * padded(p_.V()) : nullptr;
    run.delta = b_.delta ? b_.delta : delta_.data;
    run.new_delta = has_delta() ? nullptr : delta_.data;
    return run;
  }

  void clear_padded() const {
    if (!batch_.padded) return;
    clear(b_.dq);
    clear(b_.dk);
    clear(b_.dv);
  }
  int finish(int status) const {
    if (status != LOL_OK || part_rows() == 0) return status;
    const int64_t Hk = p_.kv_heads(), shared = p_.state_heads() / Hk, most = segments_.most();
    const int64_t work = batch_.real_tokens * p_.state_heads() * (p_.D() + p_.V());
    return run_workers(batch_.count * Hk * most, 0, work, [&](int64_t w, Arena) {
      const Sequence& s = batch_.sequences[w / most / Hk];
      const int64_t kv_head = w / most % Hk, j = w % most;
      if (j < segments_.count(s)) store_keys(s, kv_head, j, parts_of(s, kv_head * shared), shared);
    });
  }

  // dk and dv of the keys of which no segment before the j-th has a part: what that, later ones and
  // `shared` state heads have is added up, in that order, and rounded once. Without a window a
  // segment has a part of the key after its last query, whose own query finds it in the state.
  void store_keys(const Sequence& s, int64_t kv_head, int64_t j, KeyParts parts,
                  int64_t shared) const {
    if (!wants_inputs()) return;
    const Segment segment = segments_.at(s, j);
    const int64_t sinks = at_most(segments_.sinks(), s.tokens);
    const int64_t end = at_most(segment.end + 1, s.tokens);
    const auto store = [&](int64_t from, int64_t to) {
      add_up(tokens_of(b_.dk, s, kv_head), s, j, from, to, parts.dk, shared);
      add_up(tokens_of(b_.dv, s, kv_head), s, j, from, to, parts.dv, shared);
    };
    if (j == 0) store(0, sinks);
    store(j ? segment.begin + 1 : sinks, end);
  }
  // Keys [begin, end), sinks or none of them, into the rows of the j-th segment of the first head.
  void add_up(const Tokens& to, const Sequence& s, int64_t j, int64_t begin, int64_t end,
              float* parts, int64_t shared) const {
    const int64_t ld = padded(to.width), sinks = segments_.sinks();
    const auto first_key = [&](int64_t i) {
      return begin < sinks ? 0 : segments_.first_key(segments_.at(s, i));
    };
    const auto row = [&](int64_t head, int64_t i, int64_t key) {
      const int64_t in_segment = key - first_key(i) + (begin < sinks ? 0 : sinks);
      return parts + (head * segments_.rows() + segments_.row_in_sequence(i) + in_segment) * ld;
    };
    float* sum = row(0, j, begin);
    for (int64_t head = 0; head < shared; head++) {
      for (int64_t i = head ? j : j + 1; i < segments_.count(s); i++) {
        const int64_t from = at_least(begin, first_key(i));
        if (from >= end) break;
        const float* part = row(head, i, from);
        float* into = sum + (from - begin) * ld;
        for (int64_t at = 0; at < (end - from) * ld; at += LANES)
          store(into + at, load(into + at) + load(part + at));
      }
    }
    store_rows(to, begin, end - begin, sum);
  }

  const BackwardProblem& b_;
  const Problem& p_;
  const Batch& batch_;
  const Segments& segments_;
  const ParameterPartials& partials_;
  // Whether a thread has the parts of one sequence and state head at a time, which are near, and
  // few; or all are kept.
  const bool parts_of_thread_;
  const Buffer dk_, dv_, delta_;
};

}  // namespace

int backward(const BackwardProblem& b, const Batch& batch, const Segments& segments,
             const ParameterPartials& partials) {
  const bool shared = by_segments(segments, b.p, batch, partials.groups() * b.p.state_heads());
  // Threads that share a sequence, or the state heads of a kv head, have parts of the same keys.
  const bool parts_of_thread = !shared && b.p.state_heads() == b.p.kv_heads();
  Backward call(b, batch, segments, partials, parts_of_thread);
  if (!call.ok() || !partials.ok()) return LOL_ENOMEM;
  return shared ? call.by_segments() : call.by_sequences();
}

int backward(const BackwardProblem& b, const Batch& batch) {
  const Segments segments(b.p, batch);
  const ParameterPartials partials(b.p, batch, segments);
  const int status = backward(b, batch, segments, partials);
  if (status == LOL_OK) partials.reduce(b.parameters);
  return status;
}

}  // namespace LOL_ISA
}  // namespace lol
