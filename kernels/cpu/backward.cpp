#include "backward.h"

#include "backward_pass.h"

namespace lol {
namespace LOL_ISA {
namespace {

// The parts of dk and dv that the segments of a sequence have, for one state head.
struct KeyParts {
  float *dk, *dv;
};

// One call. A run is a group of sequences and a state head: a thread takes one from its first
// segment to the last and back. Where the last runs are too few for all threads, these share their
// segments, once the states at the borders are known, and the states' gradients.
class Backward {
 public:
  Backward(const BackwardProblem& b, const Batch& batch, const Segments& segments,
           const ParameterPartials& partials)
      : b_(b),
        p_(b.p),
        batch_(batch),
        segments_(segments),
        partials_(partials),
        runs_(partials.groups() * p_.state_heads()),
        alone_(runs_ - runs_by_segments(segments, p_, batch, runs_)),
        own_parts_(p_.state_heads() == p_.kv_heads()),
        dk_(part_rows() * padded(p_.D())),
        dv_(part_rows() * padded(p_.V())),
        delta_(has_delta() ? 0 : p_.q.shape[0] * p_.heads() * p_.q.shape[2]),
        before_(p_, segments, alone_ < runs_),
        after_(p_, segments, alone_ < runs_),
        threads_(thread_count(most_workers(), 3 * p_.work(batch.real_tokens))),
        arenas_(threads_, scratch()) {}
  bool ok() const {
    return dk_.ok() && dv_.ok() && delta_.ok() && before_.ok() && after_.ok() && arenas_.ok();
  }

  void run() {
    if (batch_.padded) {
      clear(b_.dq);
      clear(b_.dk);
      clear(b_.dv);
    }
    share(alone_, [&](int64_t w, Arena arena) { alone(w, arena); });
    if (alone_ < runs_) by_segments();
    if (part_rows() > 0) store_kept();
  }

 private:
  void alone(int64_t w, Arena arena) const {
    const int64_t head = head_of(w), rows = own_rows();
    const StateSums carried = StateSums::take(p_, arena), nothing = {};
    const KeyParts own = {arena.take(rows * padded(p_.D())), arena.take(rows * padded(p_.V()))};
    each_sequence(group_of(w), [&](const Sequence& s) {
      const int64_t last = segments_.count(s) - 1;
      const KeyParts parts = own_parts_ ? own : parts_of(s, head);
      const auto run_at = [&](int64_t j) {
        return run_of(s, head, partials_.slot(group_of(w), j), j, parts);
      };
      for (int64_t j = 0; j <= last; j++)
        backward_of_queries(run_at(j), j ? carried : initial(s, head), j < last ? carried : nothing,
                            arena);
      for (int64_t j = last; j >= 0; j--) {
        backward_of_keys(run_at(j), j < last ? carried : final_gradient(s, head),
                         j ? carried : initial_gradient(s, head), arena);
        // While they are near, and since the next sequence's come in their place.
        if (own_parts_) store_keys(s, head, j, parts, 1);
      }
    });
  }

  // The states at the borders and their gradients are found at the same time, unless these wait for
  // the delta that the queries' pass corrects.
  void by_segments() const {
    const int64_t runs = runs_ - alone_, slots = partials_.slots() * p_.state_heads();
    const bool waits = b_.corrects_delta();
    const auto states = [&](int64_t w, Arena arena) {
      const int64_t head = head_of(alone_ + w);
      each_sequence(group_of(alone_ + w), [&](const Sequence& s) {
        states_before(p_, segments_, s, head, initial(s, head), before_, arena);
      });
    };
    const auto gradients = [&](int64_t w, Arena arena) {
      const int64_t head = head_of(alone_ + w);
      each_sequence(group_of(alone_ + w), [&](const Sequence& s) {
        BackwardRun run = run_of(s, head, 0, 0, {});
        if (waits) run.new_delta = nullptr;
        gradients_after(run, segments_, final_gradient(s, head), after_, arena);
      });
    };
    const auto of_queries = [&](const BackwardRun& run, int64_t j, Arena arena) {
      const int64_t head = run.state_head;
      backward_of_queries(run, j ? before_.at(run.s, j, head) : initial(run.s, head), {}, arena);
    };
    const auto of_keys = [&](const BackwardRun& run, int64_t j, Arena arena) {
      const int64_t head = run.state_head, last = segments_.count(run.s) - 1;
      backward_of_keys(run, j < last ? after_.at(run.s, j, head) : final_gradient(run.s, head),
                       j ? StateSums{} : initial_gradient(run.s, head), arena);
    };
    const auto each_segment = [&](const auto& work) {
      share(slots, [&](int64_t w, Arena arena) { segments_of_slot(w, work, arena); });
    };
    if (waits) {
      share(runs, states);
      each_segment(of_queries);
      share(runs, gradients);
      each_segment(of_keys);
    } else {
      share(2 * runs, [&](int64_t w, Arena arena) {
        w % 2 ? gradients(w / 2, arena) : states(w / 2, arena);
      });
      const auto both = [&](const BackwardRun& run, int64_t j, Arena arena) {
        of_queries(run, j, arena);
        of_keys(run, j, arena);
      };
      each_segment(both);
    }
  }

  // work(run, segment, arena) for the segments of a slot: worker w has one, for a state head, which
  // is nothing where a thread had that run alone.
  template <class Work>
  void segments_of_slot(int64_t w, const Work& work, Arena arena) const {
    const int64_t slot = w / p_.state_heads(), head = head_of(w);
    if (partials_.group_of(slot) * p_.state_heads() + head < alone_) return;
    partials_.each_segment(slot, batch_, segments_, [&](const Sequence& s, int64_t j) {
      work(run_of(s, head, slot, j, parts_of(s, head)), j, arena);
    });
  }

  // dk and dv of the kv heads whose parts were kept.
  void store_kept() const {
    const int64_t Hk = p_.kv_heads(), shared = p_.state_heads() / Hk, most = segments_.most();
    const int64_t first = own_parts_ ? alone_ : 0;  // a run for each kv head then, or for several
    share((partials_.groups() * Hk - first) * most, [&](int64_t w, Arena) {
      const int64_t group = (first + w / most) / Hk, kv_head = (first + w / most) % Hk;
      const int64_t j = w % most;
      each_sequence(group, [&](const Sequence& s) {
        if (j < segments_.count(s))
          store_keys(s, kv_head, j, parts_of(s, kv_head * shared), shared);
      });
    });
  }

  template <class Work>
  void share(int64_t workers, const Work& work) const {
    run_workers(arenas_, threads_, workers, work);
  }
  int64_t most_workers() const {
    const int64_t by_segments = at_least(2 * (runs_ - alone_), partials_.slots());
    return at_least(alone_, alone_ < runs_ ? by_segments : 0);
  }

  int64_t group_of(int64_t run) const { return run / p_.state_heads(); }
  int64_t head_of(int64_t run) const { return run % p_.state_heads(); }
  template <class Work>
  void each_sequence(int64_t group, const Work& work) const {
    for (int64_t i = partials_.begin(group); i < partials_.end(group); i++)
      work(batch_.sequences[i]);
  }

  bool wants_inputs() const { return b_.dq.data != nullptr; }
  bool has_delta() const { return b_.delta || !p_.normalize; }
  int64_t scratch() const {
    const int64_t own = own_rows() * (padded(p_.D()) + padded(p_.V()));
    return at_least(backward_of_queries_floats(p_), backward_of_keys_floats(p_)) +
           StateSums::floats(p_) + own;
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

  // Rows of a thread's own parts.
  int64_t own_rows() const {
    return wants_inputs() && own_parts_ && alone_ > 0 ? segments_.rows_of_longest() : 0;
  }
  // The state heads whose parts are kept until all are there: these, and all after them.
  int64_t first_kept() const {
    if (!own_parts_) return 0;
    if (alone_ == runs_) return p_.state_heads();
    return partials_.groups() == 1 ? alone_ : 0;
  }
  int64_t part_rows() const {
    return wants_inputs() ? segments_.rows() * (p_.state_heads() - first_kept()) : 0;
  }
  KeyParts parts_of(const Sequence& s, int64_t head) const {
    if (part_rows() == 0) return {};
    const int64_t row = (head - first_kept()) * segments_.rows() + segments_.row(s);
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
  const int64_t runs_, alone_;  // all, and the first ones, which a thread has alone
  // Whether such a thread has the parts of one sequence at a time, which are near, and few: no
  // other run has parts of the same keys.
  const bool own_parts_;
  const Buffer dk_, dv_, delta_;
  const SegmentStates before_, after_;
  const int threads_;
  const Arenas arenas_;
};

}  // namespace

int backward(const BackwardProblem& b, const Batch& batch, const Segments& segments,
             const ParameterPartials& partials) {
  Backward call(b, batch, segments, partials);
  if (!call.ok() || !partials.ok()) return LOL_ENOMEM;
  call.run();
  return LOL_OK;
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
