// feature_map: y = phi(x), one pass over tiles of tokens; nothing but x and y touches memory.
#include "features.h"
#include "kernels.h"
#include "parallel.h"

namespace lol {
namespace LOL_ISA {
namespace {

// Tiles without tokens that would be computed one by one.
constexpr int TILE_OF_TOKENS = BLOCK / TOKENS_AT_ONCE * TOKENS_AT_ONCE;

// A feature map has no sequence structure: every [B, H] pair is one run of T tokens, cut into
// stretches of up to 8 tiles, 4 for each thread if there are as many. The hardware foresees the
// rows of a stretch, not those of single tiles that threads take from one another.
struct Stretches {
  int64_t tokens, per_head, count;
  Stretches(const lol_tensor& x, int64_t work) {
    const int64_t T = x.shape[2], heads = x.shape[0] * x.shape[1];
    const int64_t tiles = heads * ((T + TILE_OF_TOKENS - 1) / TILE_OF_TOKENS);
    tokens = TILE_OF_TOKENS * at_least(1, at_most(8, tiles / (4 * thread_count(tiles, work))));
    per_head = (T + tokens - 1) / tokens;
    count = heads * per_head;
  }
};

Sequence whole(const lol_tensor& x, int64_t batch) {
  return {batch, x.shape[2], 0, nullptr, batch};
}

// Features of more bytes than this are written past the caches: a core's own cannot hold them, and
// what is left of a shared one is better used for x and the weights.
constexpr int64_t STREAMED = 1 << 24;

}  // namespace

int feature_map(const lol_feature_map_args& a) {
  const int64_t H = a.x.shape[1], T = a.x.shape[2], D = a.x.shape[3],
                F = out_features(a.features, D);
  const int64_t tokens = a.x.shape[0] * H * T, work = tokens * D * F;
  const Stretches stretches(a.x, work);
  const int64_t scratch = features_of_tokens_scratch(D, a.features.weight.shape[2]);
  const int64_t floats = (a.x.dtype == LOL_F32 ? 0 : rows_size(D) + rows_size(F)) + scratch;
  const bool streamed = tokens * F * (int64_t)sizeof(float) > STREAMED;
  return run_workers(stretches.count, floats, work, [&](int64_t w, Arena arena) {
    const int64_t bh = w / stretches.per_head;
    const int64_t begin = w % stretches.per_head * stretches.tokens,
                  end = at_most(T, begin + stretches.tokens);
    const Sequence s = whole(a.x, bh / H);
    const Tokens from = tokens_of(a.x, s, bh % H), to = tokens_of(a.y, s, bh % H);
    const FeatureMap map = map_of(a.features, bh % H, H, D);
    float* scratch_z = arena.take(scratch);
    if (from.dtype == LOL_F32) {
      features_of_tokens(map,
                         {end - begin, (const float*)from.row(begin), from.stride / 4,
                          (float*)to.row(begin), to.stride / 4, streamed},
                         scratch_z);
      if (streamed) end_of_stream();
      return;
    }
    float *x = arena.take(rows_size(D)), *y = arena.take(rows_size(F));
    for (int64_t first = begin; first < end; first += TILE_OF_TOKENS) {
      const int64_t n = at_most(TILE_OF_TOKENS, end - first);
      prefetch_rows(from, first + n, at_most(TILE_OF_TOKENS, end - first - n));
      load_rows(x, from, first, n);
      features_of_tokens(map, {n, x, padded(D), y, padded(F), false}, scratch_z);
      store_rows(to, first, n, y);
    }
  });
}

// dx = dz W^T and the weights' gradients, z never stored. A worker takes one head of a group of
// batch entries, so each partial sum has one writer; the partials are added in order, so the result
// does not depend on the number of threads.
int feature_map_backward(const lol_feature_map_backward_args& a) {
  const int64_t B = a.x.shape[0], H = a.x.shape[1], T = a.x.shape[2], D = a.x.shape[3];
  const int64_t F = out_features(a.features, D), f = a.features.weight.shape[2];
  const int64_t groups = groups_of(B, H);
  const int64_t partial = WeightGradient::floats(D, f);
  Buffer partials(groups * H * partial);
  if (!partials.ok()) return LOL_ENOMEM;
  fill(partials.data, groups * H * partial, 0.0f);
  const int64_t floats = 2 * rows_size(D) + rows_size(F) + lanes_size(D) + 2 * lanes_size(F) +
                         transposed_weight_size(D, f) + MapBackward::scratch_size(D, f);
  const auto work = [&](int64_t w, Arena arena) {
    const int64_t h = w % H, group = w / H;
    const FeatureMap map = map_of(a.features, h, H, D);
    float *x_rows = arena.take(rows_size(D)), *x = arena.take(lanes_size(D));
    float *dy_rows = arena.take(rows_size(F)), *dx = arena.take(rows_size(D));
    float *phi = arena.take(lanes_size(F)), *dphi = arena.take(lanes_size(F));
    float* weight_t = arena.take(transposed_weight_size(D, f));
    transpose_weight(map, Format::f32, weight_t);
    MapBackward at = {x_rows,
                      x,
                      phi,
                      weight_t,
                      WeightGradient::at(partials.data + w * partial, D, f),
                      dx,
                      0,
                      arena.take(MapBackward::scratch_size(D, f))};
    const int64_t end = B * (group + 1) / groups;
    for (int64_t b = B * group / groups; b < end; b++) {
      const Sequence s = whole(a.x, b);
      for (int64_t first = 0; first < T; first += BLOCK) {
        at.n = at_most(BLOCK, T - first);
        load_rows(x_rows, tokens_of(a.x, s, h), first, at.n);
        to_lanes(x, x_rows, (int)D);
        load_rows(dy_rows, tokens_of(a.dy, s, h), first, at.n);
        to_lanes(dphi, dy_rows, (int)F);
        features_forward(map, x, phi);
        memset(dx, 0, sizeof(float) * (size_t)rows_size(D));
        features_backward(map, at, dphi);
        store_rows(tokens_of(a.dx, s, h), first, at.n, dx);
      }
    }
  };
  const int status = run_workers(groups * H, floats, 2 * B * H * T * D * F, work);
  if (status == LOL_OK)
    WeightGradient::reduce(partials.data, groups, H, a.features, D, a.dweight, a.dbias);
  return status;
}

}  // namespace LOL_ISA
}  // namespace lol
