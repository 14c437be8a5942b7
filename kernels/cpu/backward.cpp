#include "backward.h"

#include "backward_pass.h"

namespace lol {
namespace LOL_ISA {
namespace {

// One call: its segments, its scratch, and the runs that both ways of sharing it out consist of.
class Backward {
 public:
  Backward(const BackwardProblem& b, const Batch& batch, const Segments& segments,
           const ParameterPartials& partials)
      : b_(b),
        p_(b.p),
        batch_(batch),
        segments_(segments),
        partials_(partials),
        dk_(wants_inputs() ? segments.rows() * p_.state_heads() * padded(p_.D()) : 0),
        dv_(wants_inputs() ? segments.rows() * p_.state_heads() * padded(p_.V()) : 0),
        delta_(has_delta() ? 0 : p_.q.shape[0] * p_.heads() * p_.q.shape[2]) {}
  bool ok() const { return dk_.ok() && dv_.ok() && delta_.ok(); }

  // Threads take groups of sequences, each from its first segment to the last and back.
  int by_sequences() {
    const int64_t floats = scratch() + StateSums::floats(p_);
    const auto work = [&](int64_t w, Arena arena) {
      const int64_t group = w / p_.state_heads(), head = w % p_.state_heads();
      const StateSums carried = StateSums::take(p_, arena), nothing = {};
      for (int64_t i = partials_.begin(group); i < partials_.end(group); i++) {
        const Sequence& s = batch_.sequences[i];
        const int64_t last = segments_.count(s) - 1;
        for (int64_t j = 0; j <= last; j++)
          queries(run_of(s, head, partials_.slot(group, j), j), j ? carried : initial(s, head),
                  j < last ? carried : nothing, arena);
        for (int64_t j = last; j >= 0; j--)
          backward_of_keys(run_of(s, head, partials_.slot(group, j), j),
                           j < last ? carried : final_gradient(s, head),
                           j ? carried : initial_gradient(s, head), arena);
      }
    };
    return finish(run_workers(partials_.groups() * p_.state_heads(), floats, all_work(), work,
                              [&] { clear_padded(); }));
  }

  // Threads take segments, once the states at their borders are known, and the states' gradients:
  // at the same time, unless these wait for the delta that the queries' pass corrects.
  int by_segments() {
    const SegmentStates before(p_, segments_), after(p_, segments_);
    if (!before.ok() || !after.ok()) return LOL_ENOMEM;
    const bool waits = b_.corrects_delta();
    const int64_t Hs = p_.state_heads(), heads = batch_.count * Hs;
    const auto sequence_of = [&](int64_t w) -> const Sequence& { return batch_.sequences[w / Hs]; };
    const auto states = [&](int64_t w, Arena arena) {
      const Sequence& s = sequence_of(w);
      states_before(p_, segments_, s, w % Hs, initial(s, w % Hs), before, arena);
    };
    const auto gradients = [&](int64_t w, Arena arena) {
      const Sequence& s = sequence_of(w);
      BackwardRun run = run_of(s, w % Hs, 0, 0);
      if (waits) run.new_delta = nullptr;
      gradients_after(run, segments_, final_gradient(s, w % Hs), after, arena);
    };
    const auto of_queries = [&](const BackwardRun& run, int64_t j, Arena arena) {
      const int64_t head = run.state_head;
      queries(run, j ? before.at(run.s, j, head) : initial(run.s, head), {}, arena);
    };
    const auto of_keys = [&](const BackwardRun& run, int64_t j, Arena arena) {
      const int64_t head = run.state_head, last = segments_.count(run.s) - 1;
      backward_of_keys(run, j < last ? after.at(run.s, j, head) : final_gradient(run.s, head),
                       j ? StateSums{} : initial_gradient(run.s, head), arena);
    };
    const auto clear_rows = [&] { clear_padded(); };
    int status;
    if (waits) {
      status = run_workers(heads, scratch(), all_work(), states);
      if (status == LOL_OK) status = each_segment(of_queries, clear_rows);
      if (status == LOL_OK) status = run_workers(heads, scratch(), all_work(), gradients);
      if (status == LOL_OK) status = each_segment(of_keys, [] {});
    } else {
      status = run_workers(2 * heads, scratch(), all_work(), [&](int64_t w, Arena arena) {
        w % 2 ? gradients(w / 2, arena) : states(w / 2, arena);
      });
      const auto both = [&](const BackwardRun& run, int64_t j, Arena arena) {
        of_queries(run, j, arena);
        of_keys(run, j, arena);
      };
      if (status == LOL_OK) status = each_segment(both, clear_rows);
    }
    return finish(status);
  }

 private:
  // work(run, segment, arena) for every segment that there is.
  template <class Work, class Prepare>
  int each_segment(Work work, Prepare prepare) const {
    const int64_t Hs = p_.state_heads();
    const auto of_slot = [&](int64_t w, Arena arena) {
      const int64_t slot = w / Hs, group = partials_.group_of(slot);
      const int64_t j = partials_.segment_of(slot);
      for (int64_t i = partials_.begin(group); i < partials_.end(group); i++) {
        const Sequence& s = batch_.sequences[i];
        if (j < segments_.count(s)) work(run_of(s, w % Hs, slot, j), j, arena);
      }
    };
    return run_workers(partials_.slots() * Hs, scratch(), all_work(), of_slot, prepare);
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
  int64_t row(const Sequence& s, int64_t head, int64_t j) const {
    return head * segments_.rows() + segments_.row(s, j);
  }

  BackwardRun run_of(const Sequence& s, int64_t head, int64_t slot, int64_t j) const {
    const Segment segment = segments_.at(s, j);
    const int64_t at = row(s, head, j);
    return {b_,
            p_,
            s,
            partials_,
            head,
            slot,
            segment,
            segments_.sinks(),
            segments_.first_key(segment),
            wants_inputs() ? dk_.data + at * padded(p_.D()) : nullptr,
            wants_inputs() ? dv_.data + at * padded(p_.V()) : nullptr,
            b_.delta ? b_.delta : delta_.data,
            has_delta() ? nullptr : delta_.data};
  }

  // The pass forward in time comes first: the other adds to its dk and dv.
  void queries(const BackwardRun& run, StateSums before, StateSums after, Arena arena) const {
    if (wants_inputs()) {
      const int64_t rows = segments_.rows_of(run.segment);
      fill(run.dk, rows * padded(p_.D()), 0.0f);
      fill(run.dv, rows * padded(p_.V()), 0.0f);
    }
    backward_of_queries(run, before, after, arena);
  }

  void clear_padded() const {
    if (!batch_.padded) return;
    clear(b_.dq);
    clear(b_.dk);
    clear(b_.dv);
  }
  int finish(int status) const {
    if (status != LOL_OK || !wants_inputs()) return status;
    const int keys = store_key_gradients(b_.dk, dk_.data);
    return keys ? keys : store_key_gradients(b_.dv, dv_.data);
  }

  // dk or dv: what the segments and state heads have of each key of a kv head, added up and rounded
  // once.
  int store_key_gradients(const lol_tensor& out, const float* parts) const {
    const int64_t Hk = p_.kv_heads(), shared = p_.state_heads() / Hk, sinks = segments_.sinks();
    const int ld = padded(out.shape[3]);
    const int64_t work = batch_.real_tokens * p_.state_heads() * ld;
    return run_workers(batch_.count * Hk, ld, work, [&](int64_t w, Arena arena) {
      const Sequence& s = batch_.sequences[w / Hk];
      const Tokens to = tokens_of(out, s, w % Hk);
      float* sum = arena.take(ld);
      for (int64_t i = 0; i < s.tokens; i++) {
        fill(sum, ld, 0.0f);
        for (int64_t head = w % Hk * shared; head < (w % Hk + 1) * shared; head++) {
          // Without a window the first query of a segment finds itself in the state.
          for (int64_t j = i < sinks ? 0 : segments_.of(at_least(i - 1, 0)); j < segments_.count(s);
               j++) {
            const int64_t first = segments_.first_key(segments_.at(s, j));
            if (i >= sinks && first > i) break;
            const int64_t at = row(s, head, j) + (i < sinks ? i : sinks + i - first);
            for (int c = 0; c < ld; c += LANES)
              store(sum + c, load(sum + c) + load(parts + at * ld + c));
          }
        }
        store_row(to.row(i), sum, to.width, to.dtype);
      }
    });
  }

  const BackwardProblem& b_;
  const Problem& p_;
  const Batch& batch_;
  const Segments& segments_;
  const ParameterPartials& partials_;
  const Buffer dk_, dv_, delta_;
};

}  // namespace

int backward(const BackwardProblem& b, const Batch& batch, const Segments& segments,
             const ParameterPartials& partials) {
  Backward call(b, batch, segments, partials);
  if (!call.ok() || !partials.ok()) return LOL_ENOMEM;
  const bool shared = by_segments(segments, b.p, batch, partials.groups() * b.p.state_heads());
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
