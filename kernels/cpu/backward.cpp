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

  // Threads take segments, once the states at their borders are known.
  int by_segments() {
    const SegmentStates before(p_, segments_), after(p_, segments_);
    if (!before.ok() || !after.ok()) return LOL_ENOMEM;
    const int64_t Hs = p_.state_heads();
    const auto borders = [&](int64_t w, Arena arena) {
      const Sequence& s = batch_.sequences[w / 2 / Hs];
      const int64_t head = w / 2 % Hs;
      if (w % 2) {
        gradients_after(run_of(s, head, 0, 0), segments_, final_gradient(s, head), after, arena);
      } else {
        states_before(p_, segments_, s, head, initial(s, head), before, arena);
      }
    };
    const auto work = [&](int64_t w, Arena arena) {
      const int64_t slot = w / Hs, head = w % Hs;
      const int64_t group = partials_.group_of(slot), j = partials_.segment_of(slot);
      for (int64_t i = partials_.begin(group); i < partials_.end(group); i++) {
        const Sequence& s = batch_.sequences[i];
        const int64_t last = segments_.count(s) - 1;
        if (j > last) continue;
        const BackwardRun run = run_of(s, head, slot, j);
        queries(run, j ? before.at(s, j, head) : initial(s, head), {}, arena);
        backward_of_keys(run, j < last ? after.at(s, j, head) : final_gradient(s, head),
                         j ? StateSums{} : initial_gradient(s, head), arena);
      }
    };
    const int status = run_workers(2 * batch_.count * Hs, scratch(), all_work(), borders);
    if (status != LOL_OK) return status;
    return finish(
        run_workers(partials_.slots() * Hs, scratch(), all_work(), work, [&] { clear_padded(); }));
  }

 private:
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
