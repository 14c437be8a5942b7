// Compares the functions of cpu/exponentials.h and simd.h with double precision, over the bit
// patterns of all floats, every STRIDE-th of them:
//
//     accuracy [STRIDE]
//
// prints a line for each claim: its name, the worst error and where that is. It is compiled with
// the flags of an instruction set, like the kernels.
#include "cpu/exponentials.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

using namespace lol::LOL_ISA;

namespace {

constexpr double LEAST_NORMAL = 0x1p-126;

bool is_normal(double x) { return std::fabs(x) >= LEAST_NORMAL && std::fabs(x) < 0x1p128; }

// In units of the last place of a float of that size.
double in_ulp(double error, double value) {
  return std::fabs(error) / std::ldexp(1.0, std::max(std::ilogb(value), -126) - 23);
}

struct Worst {
  const char* name;
  double error;
  float at;
  void see(double seen, float x) {
    if (std::isnan(error) || seen <= error) return;  // a NaN is worst, and stays
    error = seen;
    at = x;
  }
  void see(const Worst& other) { see(other.error, other.at); }
};

struct Report {
  Worst exp{"exp_ulp", 0, 0}, exp_below{"exp_below_relative", 0, 0},
      exp_above{"exp_above_ulp", 0, 0}, exp_both_ways{"exp_both_ways_ulp", 0, 0},
      exp_for_bf16{"exp_for_bf16_relative", 0, 0},
      reciprocal_for_bf16{"reciprocal_for_bf16_relative", 0, 0}, log{"log_excess", 0, 0},
      nan{"nan_lost", 0, 0};

  template <class Visit>
  void each(Report& other, Visit visit) {
    visit(exp, other.exp), visit(exp_below, other.exp_below);
    visit(exp_above, other.exp_above), visit(exp_both_ways, other.exp_both_ways);
    visit(exp_for_bf16, other.exp_for_bf16);
    visit(reciprocal_for_bf16, other.reciprocal_for_bf16);
    visit(log, other.log), visit(nan, other.nan);
  }
};

void see_exponentials(Report& report, const Vec& xs) {
  const Vec es = exp(xs), below = exp_below_one(xs), coarse = exp_below_one_for_bf16(xs);
  for (int i = 0; i < LANES; i++) {
    const float x = xs[i];
    if (std::isnan(x)) {
      report.nan.see(!std::isnan(es[i]) + !std::isnan(below[i]) + !std::isnan(coarse[i]), x);
      continue;
    }
    if (x < -87.33f) {  // stays at the least normal float, nearly
      report.exp_below.see(std::fabs(es[i] / LEAST_NORMAL - 1), x);
      report.exp_below.see(std::fabs(below[i] / LEAST_NORMAL - 1), x);
      report.exp_below.see(std::fabs(coarse[i] / LEAST_NORMAL - 1), x);
      continue;
    }
    const bool above = x > 88.37f;  // stays at e^88.37
    const double truth = std::exp((double)std::min(x, 88.37f));
    (above ? report.exp_above : report.exp).see(in_ulp(es[i] - truth, truth), x);
    if (above) continue;  // the others are not for those
    report.exp.see(in_ulp(below[i] - truth, truth), x);
    report.exp_for_bf16.see(std::fabs(coarse[i] / truth - 1), x);
  }
}

void see_both_ways(Report& report, const Vec& xs) {
  const BothWays es = exp_both_ways_within(xs);
  for (int i = 0; i < LANES; i++) {
    const float x = xs[i];
    if (std::isnan(x)) report.nan.see(!std::isnan(es.up[i]) + !std::isnan(es.down[i]), x);
    if (!(std::fabs(x) <= 87)) continue;
    const double up = std::exp((double)x), down = std::exp(-(double)x);
    report.exp_both_ways.see(in_ulp(es.up[i] - up, up), x);
    report.exp_both_ways.see(in_ulp(es.down[i] - down, down), x);
  }
}

void see_others(Report& report, const Vec& xs) {
  const Vec coarse = reciprocal_for_bf16(xs), ls = log(xs);
  for (int i = 0; i < LANES; i++) {
    const double x = xs[i], truth = 1 / x;
    if (is_normal(x) && is_normal(truth))
      report.reciprocal_for_bf16.see(std::fabs(coarse[i] / truth - 1), xs[i]);
    if (x > 0 && is_normal(x)) {
      const double ln = std::log(x);
      const double allowed = 1e-7 + 2 * std::ldexp(1.0, std::max(std::ilogb(ln), -126) - 23);
      report.log.see(std::fabs(ls[i] - ln) / allowed, xs[i]);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t stride = argc > 1 ? atoll(argv[1]) : 1, floats = 1LL << 32;
  if (stride < 1) return 2;
  Report report;
#pragma omp parallel
  {
    Report own;
#pragma omp for schedule(dynamic, 1024)
    for (int64_t first = 0; first < floats / stride; first += LANES) {
      VecU bits;
      for (int i = 0; i < LANES; i++) bits[i] = (uint32_t)((first + i) * stride);
      see_exponentials(own, (Vec)bits);
      see_both_ways(own, (Vec)bits);
      see_others(own, (Vec)bits);
    }
#pragma omp critical
    report.each(own, [](Worst& all, const Worst& some) { all.see(some); });
  }
  report.each(report, [](const Worst& worst, const Worst&) {
    std::printf("%s %.9g %.9g\n", worst.name, worst.error, worst.at);
  });
  return 0;
}
