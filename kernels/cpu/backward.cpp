#include "backward.h"

#include "backward_pass.h"

namespace lol {
namespace LOL_ISA {
namespace {

// dk or dv: the state heads' parts of each kv head, added up and rounded once.
void store_key_gradients(const lol_tensor& out, const float* parts, const Problem& p,
                         const Batch& batch) {
  const int64_t T = out.shape[2], Hk = p.kv_heads(), Hs = p.state_heads(), shared = Hs / Hk;
  const int ld = padded(out.shape[3]);
  run_workers(batch.count * Hk, ld, batch.real_tokens * Hs * ld, [&](int64_t w, Arena arena) {
    const Sequence& s = batch.sequences[w / Hk];
    const Tokens to = tokens_of(out, s, w % Hk);
    float* sum = arena.take(ld);
    for (int64_t i = 0; i < s.tokens; i++) {
      const float* part =
          parts + ((s.batch * Hs + w % Hk * shared) * T + (s.index ? 0 : s.first) + i) * ld;
      memcpy(sum, part, sizeof(float) * ld);
      for (int64_t head = 1; head < shared; head++) {
        for (int j = 0; j < ld; j += LANES)
          store(sum + j, load(sum + j) + load(part + head * T * ld + j));
      }
      store_row(to.row(i), sum, to.width, to.dtype);
    }
  });
}

}  // namespace

int backward(const BackwardProblem& b, const Batch& batch, const ParameterPartials& partials) {
  const Problem& p = b.p;
  const int64_t B = p.q.shape[0], T = p.q.shape[2], Hs = p.state_heads();
  const int64_t rows = b.dq.data ? B * Hs * T : 0;
  Buffer dk(rows * padded(p.D())), dv(rows * padded(p.V()));
  Buffer delta(b.delta || !p.normalize ? 0 : B * p.heads() * T);
  if (!dk.ok() || !dv.ok() || !delta.ok() || !partials.ok()) return LOL_ENOMEM;
  const auto prepare = [&] {
    if (!batch.padded) return;
    clear(b.dq);
    clear(b.dk);
    clear(b.dv);
  };
  const auto work = [&](int64_t w, Arena arena) {
    for (int64_t i = partials.begin(w); i < partials.end(w); i++) {
      const Sequence& s = batch.sequences[i];
      const int64_t head = partials.state_head(w), at = (s.batch * Hs + head) * T;
      const BackwardRun run = {b,
                               p,
                               s,
                               partials,
                               head,
                               w,
                               rows ? dk.data + at * padded(p.D()) : nullptr,
                               rows ? dv.data + at * padded(p.V()) : nullptr,
                               b.delta ? b.delta : delta.data,
                               b.delta || !p.normalize ? nullptr : delta.data};
      if (run.wants_inputs()) {
        memset(run.dk_at(0), 0, sizeof(float) * (size_t)(s.tokens * padded(p.D())));
        memset(run.dv_at(0), 0, sizeof(float) * (size_t)(s.tokens * padded(p.V())));
      }
      backward_of_queries(run, arena);
      backward_of_keys(run, arena);
    }
  };
  const int64_t floats = at_least(backward_of_queries_floats(p), backward_of_keys_floats(p));
  const int status =
      run_workers(partials.workers(), floats, 3 * p.work(batch.real_tokens), work, prepare);
  if (status == LOL_OK && rows) {
    store_key_gradients(b.dk, dk.data, p, batch);
    store_key_gradients(b.dv, dv.data, p, batch);
  }
  return status;
}

int backward(const BackwardProblem& b, const Batch& batch) {
  const ParameterPartials partials(b.p, batch);
  const int status = backward(b, batch, partials);
  if (status == LOL_OK) partials.reduce(b.parameters);
  return status;
}

}  // namespace LOL_ISA
}  // namespace lol
