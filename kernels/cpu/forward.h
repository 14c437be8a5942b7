// The forward pass over many recurrent states, or over time where there are few of them.
#pragma once
#include "chunkwise.h"
#include "parallel.h"

namespace lol {
namespace LOL_ISA {

// One sequence and state head: the queries are the positions [past, total).
struct Run {
  const Sequence* sequence;
  int64_t state_head;
  Tokens k, v;
  int64_t past, total;
  const float *kv, *ksum;  // the state before, or null: empty
  int64_t folded;          // which holds the positions before this one
  // The state after the last token, once all keys before `fold` are in it; or null.
  float *final_kv, *final_ksum;
  int64_t fold;
};

struct Outputs {
  lol_tensor o;
  float *m, *den;  // [B, H, T], or null
};

// Before the runs of a padded batch: outputs of padded queries are 0, their m 0 and den 1.
void clear_padding(const Batch& batch, const lol_tensor& o, float* m, float* den);

// One run in one thread.
void forward(const Problem& p, const Run& run, const Outputs& out, Arena arena);

// Several threads on one run, each on a stretch of blocks of queries at a time. A stretch loads its
// keys with their features, takes the state over from the stretch before it, folds its own keys,
// from one place to the next so that every block's stays, and hands the state on; then it attends.
// So the threads work at different stretches, of which only the folding, a quarter, has to wait for
// one another. Each sum is taken in the order in which one thread takes it: results are the same to
// the bit.
class Team {
 public:
  static int threads_for(const Problem& p, const Batch& batch);
  // How many of so many runs, the last ones, a team should take: as long as there is one for every
  // thread, each is a single thread's.
  static int64_t share_of(int64_t runs, const Problem& p, const Batch& batch);
  Team(const Problem& p, int threads);  // 0 if there is nothing for it to do
  bool ok() const { return memory_.ok(); }
  void forward(const Run& run, const Outputs& out);

 private:
  const Problem& p_;
  int threads_;
  int64_t member_;  // floats of one thread
  Buffer memory_;
};

// All runs; run_of(sequence, state_head) describes one.
template <class RunOf>
int forward(const Problem& p, const Batch& batch, const Outputs& out, RunOf run_of) {
  const int64_t runs = batch.count * p.state_heads();
  const int64_t alone = runs - Team::share_of(runs, p, batch);
  const auto run_at = [&](int64_t w) {
    return run_of(batch.sequences[w / p.state_heads()], w % p.state_heads());
  };
  Team team(p, alone < runs ? Team::threads_for(p, batch) : 0);
  if (!team.ok()) return LOL_ENOMEM;
  const int status = run_workers(
      alone, Chunkwise::floats(p), p.work(batch.real_tokens),
      [&](int64_t w, Arena arena) { forward(p, run_at(w), out, arena); },
      [&] { clear_padding(batch, out.o, out.m, out.den); });
  if (status != LOL_OK) return status;
  for (int64_t w = alone; w < runs; w++) team.forward(run_at(w), out);
  return LOL_OK;
}

}  // namespace LOL_ISA
}  // namespace lol
