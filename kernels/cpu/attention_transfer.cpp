// attention_transfer (SPEC 7): teacher = causal softmax attention, student = hybrid attention on
// the same q, k, v, and how far apart they are. Both are streamed over tiles. FLOPs per head: 2 T^2
// (D + V) / 2 for the teacher beside the hybrid's; with the cross-entropy T^2 (D + F) / 2 more for
// every pair of a query and a key, once forward and three times backward.
#include "backward.h"
#include "cross_entropy.h"
#include "forward.h"
#include "kernels.h"
#include "parallel.h"

namespace lol {
namespace LOL_ISA {
namespace {

Window everything() { return {INT64_MAX / 4, LOL_SLIDING, 0}; }

// How far the student is from the teacher, summed over queries.
struct Distances {
  double squares, entropy;
};

class TransferWorker {
 public:
  static int64_t floats(const Problem& p) {
    return Chunkwise::floats(p) + AttentionWeights::floats(p) + rows_size(p.V());
  }
  TransferWorker(const lol_attention_transfer_args& a, const Problem& p, const Sequence& s,
                 int64_t state_head, Arena& arena)
      : a_(a),
        p_(p),
        s_(s),
        state_head_(state_head),
        student_(p, state_head, s.tokens, tokens_of(p.k, s, p.kv_head_of(state_head)),
                 tokens_of(p.v, s, p.kv_head_of(state_head)), arena),
        weights_(p, state_head, s, arena) {
    teacher_.y = arena.take(rows_size(p.V()));
  }

  // The state before a segment that is the worker's first, but not the sequence's.
  void load_state(const Segment& segment, StateSums before) {
    student_.load_state(before.kv, before.ksum, folded_before(p_, segment));
  }
  // From then on, or from the first segment on, one after the other.
  Distances run(const Segment& segment) {
    const int64_t h0 = state_head_ * p_.group();
    Distances sums = {};
    for (int64_t first = segment.begin; first < segment.end; first += BLOCK) {
      student_.fold(p_.window.start(first));
      for (int64_t h = h0; h < h0 + p_.group(); h++) block(first, h, &sums);
    }
    return sums;
  }

 private:
  void block(int64_t first, int64_t h, Distances* sums) {
    const int ld = padded(p_.V());
    const Queries block = student_.load_queries(h, first, at_most(BLOCK, s_.tokens - first),
                                                tokens_of(p_.q, s_, h), p_.lambda(h));
    Sums& student = student_.attend(block, h);
    gather(weights_.tiles, everything(), block, 0, p_, 1.0f, student_.scores, nullptr, teacher_);
    float lse[BLOCK], delta[BLOCK];
    for (int c = 0; c < BLOCK; c += LANES)
      store(lse + c, load(teacher_.m + c) + log(load(teacher_.den + c)));
    normalize(teacher_, block.n, (int)p_.V());
    store_rows(tokens_of(a_.teacher, s_, h), first, block.n, teacher_.y);
    for (int64_t i = 0; i < block.n; i++) {
      Vec dot = {}, square = {};
      for (int64_t at = i * ld; at < (i + 1) * ld; at += LANES) {
        const Vec y = load(student.y + at), residual = y - load(teacher_.y + at);
        dot += residual * y;
        square += residual * residual;
        store(student.y + at, residual);
      }
      delta[i] = horizontal_sum(dot);
      sums->squares += horizontal_sum(square);
    }
    store_rows(tokens_of(a_.residual, s_, h), first, block.n, student.y);
    for (int64_t i = 0; i < block.n; i++) {
      const int64_t row = p_.statistics_of(s_, h) + s_.row(first + i);
      ((float*)a_.student.m.data)[row] = student.m[i];
      ((float*)a_.student.den.data)[row] = student.den[i];
      ((float*)a_.lse.data)[row] = lse[i];
      ((float*)a_.delta.data)[row] = delta[i];
    }
    if (a_.with_xent)
      sums->entropy += cross_entropy(weights_, block, h, student.m, student.den, lse);
  }

  const lol_attention_transfer_args& a_;
  const Problem& p_;
  const Sequence& s_;
  const int64_t state_head_;
  Chunkwise student_;
  AttentionWeights weights_;
  Sums teacher_;
};

}  // namespace

int attention_transfer(const lol_attention_transfer_args& a, const Batch& batch) {
  const Problem p = problem_of(a.student);
  const Segments segments(p, batch);
  const int64_t Hs = p.state_heads(), runs = batch.count * Hs, most = segments.most();
  const int64_t alone = runs - runs_by_segments(segments, p, batch, runs);
  const int threads =
      thread_count(at_least(alone, (runs - alone) * most), p.work(batch.real_tokens));
  const SegmentStates before(p, segments, alone < runs);
  const Arenas arenas(threads, TransferWorker::floats(p));
  const Buffer sums(Hs * segments.places() * (int64_t)(sizeof(Distances) / sizeof(float)));
  if (!before.ok() || !arenas.ok() || !sums.ok()) return LOL_ENOMEM;
  if (batch.padded) {
    const int64_t rows = p.q.shape[0] * p.heads() * p.q.shape[2];
    clear_padding(batch, a.teacher, (float*)a.student.m.data, (float*)a.student.den.data);
    clear(a.residual);
    fill((float*)a.delta.data, rows, 0.0f);
    fill((float*)a.lse.data, rows, 0.0f);
  }
  const auto sequence_of = [&](int64_t run) -> const Sequence& {
    return batch.sequences[run / Hs];
  };
  const auto partial = [&](int64_t run, int64_t j) -> Distances& {
    const int64_t place = segments.place(sequence_of(run), j);
    return ((Distances*)sums.data)[run % Hs * segments.places() + place];
  };
  // A thread takes the first runs, a sequence and a state head, whole; threads share the segments
  // of the others.
  run_workers(arenas, threads, alone, [&](int64_t run, Arena arena) {
    const Sequence& s = sequence_of(run);
    TransferWorker worker(a, p, s, run % Hs, arena);
    for (int64_t j = 0; j < segments.count(s); j++) partial(run, j) = worker.run(segments.at(s, j));
  });
  run_workers(arenas, threads, runs - alone, [&](int64_t w, Arena arena) {
    const int64_t run = alone + w;
    states_before(p, segments, sequence_of(run), run % Hs, {}, before, arena);
  });
  run_workers(arenas, threads, (runs - alone) * most, [&](int64_t w, Arena arena) {
    const int64_t run = alone + w % (runs - alone);
    const int64_t j = most - 1 - w / (runs - alone);  // the teacher's longest first
    const Sequence& s = sequence_of(run);
    if (j >= segments.count(s)) return;
    TransferWorker worker(a, p, s, run % Hs, arena);
    if (j > 0) worker.load_state(segments.at(s, j), before.at(s, j, run % Hs));
    partial(run, j) = worker.run(segments.at(s, j));
  });
  Distances total = {};  // whose order does not depend on threads
  for (int64_t run = 0; run < runs; run++) {
    for (int64_t j = 0; j < segments.count(sequence_of(run)); j++) {
      total.squares += partial(run, j).squares;
      total.entropy += partial(run, j).entropy;
    }
  }
  const double queries = (double)at_least(batch.real_tokens * p.heads(), 1);
  *(float*)a.mse.data = (float)(total.squares / (queries * (double)p.V()));
  *(float*)a.xent.data = (float)(total.entropy / queries);
  return LOL_OK;
}

int attention_transfer_backward(const lol_attention_transfer_backward_args& a, const Batch& batch) {
  const lol_attention_transfer_args& fwd = a.forward;
  const Problem p = problem_of(fwd.student);
  const double queries = (double)at_least(batch.real_tokens * p.heads(), 1);
  BackwardProblem b(p);
  b.dy = fwd.residual;
  b.dy_factor = (float)(2.0 * *(const float*)a.d_mse.data / (queries * (double)p.V()));
  b.delta = (const float*)fwd.delta.data;
  b.den = (const float*)fwd.student.den.data;
  b.parameters = {a.dweight_q, a.dbias_q, a.dweight_k, a.dbias_k, (float*)a.dgate.data};
  const Segments segments(b.p, batch);
  const ParameterPartials partials(b.p, batch, segments);
  int status = backward(b, batch, segments, partials);
  if (status == LOL_OK && fwd.with_xent) {
    const float factor = (float)(*(const float*)a.d_xent.data / queries);
    status = cross_entropy_backward(fwd, p, batch, segments, factor, partials);
  }
  if (status == LOL_OK) partials.reduce(b.parameters);
  return status;
}

}  // namespace LOL_ISA
}  // namespace lol
