// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of each instruction set of a build against definitions in plain loops, without PyTorch: for
// machines that are only emulated (`make aarch64`).
//
//   kernel_parity CASES SEED [FAULT]
//
// Pruning and sums are compared bit for bit, convolutions of small integers too, those of other numbers within
// the bound of any sum in float32. Each case is a function of the seed and of its number. With the name of a
// kernel as FAULT its results are made wrong, so that the comparison has to fail.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>

#include "conv_backward.h"
#include "conv_plan.h"
#include "depthwise.h"
#include "isa.h"
#include "layout.h"
#include "operands.h"
#include "prune.h"
#include "wrapped.h"

namespace {

using namespace parity;
using namespace sparsebwd;

std::string context;

// ---- what is compared

[[noreturn]] void fail(const std::string& what) {
  printf("FAILED %s: %s\n", context.c_str(), what.c_str());
  exit(1);
}

std::string hex(uint32_t bits) {
  char text[16];
  snprintf(text, sizeof(text), "%#x", bits);
  return text;
}

void expect_same_bits(const char* what, const Tensor& actual, const Tensor& expected) {
  if (!actual.fences_kept()) fail(std::string(what) + ": written beside the tensor");
  for (int64_t i = 0; i < expected.count(); ++i)
    if (actual.bits(i) != expected.bits(i))
      fail(std::string(what) + ": element " + std::to_string(i) + " is " + hex(actual.bits(i)) +
           " instead of " + hex(expected.bits(i)));
}

void expect_sums(const char* what, const Tensor& actual, const Sums& expected, bool exact) {
  if (!actual.fences_kept()) fail(std::string(what) + ": written beside the tensor");
  const bool single = actual.dtype() == DType::kFloat32;
  for (int64_t i = 0; i < actual.count(); ++i) {
    const double sum = expected.sum[i], found = actual.get(i),
                 error = exact ? 0 : expected.bound(i);
    const auto rounded =
        static_cast<float>(sum);  // once more to bfloat16, which is exact before that if `exact`
    const double nearest = single ? rounded : float_of_bfloat16(bfloat16_of_float(rounded));
    const double half_ulp = (fabs(sum) + error) * (single ? 0x1p-24 : 0x1p-8);
    if (exact ? found == nearest : fabs(found - sum) <= error + half_ulp) continue;
    fail(std::string(what) + ": element " + std::to_string(i) + " is " + std::to_string(found) +
         " instead of " + std::to_string(sum) + ", error allowed " + std::to_string(error));
  }
}

// ---- inputs

// Workers take turns: tasks may run in any order and on any of them.
void run_in_turns(int threads, int64_t tasks, TaskBody body, void* arguments) {
  for (int64_t task = tasks - 1; task >= 0; --task)
    body(arguments, task, static_cast<int>(task % threads));
}

TaskPool random_pool(Random& random) {
  return {static_cast<int>(random.pick({1, 2, 5})), run_in_turns};
}

// The last one is a signalling NaN.
const float kSpecial[] = {
    0.0f, -0.0f, INFINITY, -INFINITY, NAN, 1e-40f, -1e-40f, 3e38f, float_of_bits(0xFFA00001u)};

void fill(Tensor& tensor, Random& random, double density, bool integers) {
  for (int64_t i = 0; i < tensor.count(); ++i) {
    const auto integer = static_cast<float>(random.between(1, 20) * random.pick({-1, 1}));
    const float value = integers ? integer : random.normal();
    tensor.set(i, random.chance(density) ? value : 0.0f);
  }
}

PruneSpec random_spec(Random& random, DType dtype, float tau) {
  return make_prune_spec(dtype == DType::kFloat32 ? tau : float_of_bfloat16(bfloat16_of_float(tau)),
                         random.word(), random.word());
}

// Thresholds of single images, 0 among them; none for some tensors.
std::vector<float> random_taus(Random& random, DType dtype, const PruneSpec& spec, int64_t images) {
  std::vector<float> taus(static_cast<size_t>(random.chance(0.5) ? images : 0));
  for (float& tau : taus)
    tau = random_spec(random, dtype, spec.tau * random.pick({0.0f, 0.5f, 0.75f, 1.0f})).tau;
  return taus;
}

const float* or_null(const std::vector<float>& taus) {
  return taus.empty() ? nullptr : taus.data();
}

// Prunes by the definition. Returns the number of non-zeros.
int64_t prune_defined(Tensor& g, const PruneSpec& spec, const std::vector<float>& taus) {
  int64_t found = 0;
  for (int64_t i = 0; i < g.count(); ++i) {
    const int64_t w = i % g.size(3), h = i / g.size(3) % g.size(2),
                  c = i / g.size(3) / g.size(2) % g.size(1);
    const int64_t n = i / g.size(3) / g.size(2) / g.size(1);
    const PhiloxCounter words =
        prune_words(spec, static_cast<uint32_t>(n), static_cast<uint32_t>(c / 4),
                    static_cast<uint32_t>(h), static_cast<uint32_t>(w));
    const float value = g.get(i);
    const float tau = taus.empty() ? spec.tau : taus[static_cast<size_t>(n)];
    const float pruned = tau > 0 ? prune_element(value, tau, words.word[c % 4]) : value;
    if (float_bits(pruned) != float_bits(value)) g.set(i, pruned);
    found += pruned != 0.0f;
  }
  return found;
}

// ---- cases

void check_prune(Random& random, const std::vector<const IsaKernels*>& isas) {
  const DType dtype = random.pick({DType::kFloat32, DType::kBFloat16});
  const bool planes = random.chance(0.5);
  const int64_t size[] = {random.between(1, 3),
                          random.pick({random.size(300), random.size(9) * 32}), random.size(9),
                          random.size(70)};
  const float scale =
      random.pick({1.0f, 1.0f, 1.0f, 1e-30f});  // below the range of the vector kernels
  const PruneSpec spec =
      random_spec(random, dtype, random.pick({0.0f, 0.75f, 1.25f, 3e38f}) * scale);
  Tensor g(dtype, size, planes ? kPlanes : kChannelsLast, random);
  fill(g, random, random.pick({0.1, 0.9}), false);
  if (scale != 1.0f)
    for (int64_t i = 0; i < g.count(); ++i) g.set(i, g.get(i) * scale);
  for (const float value : kSpecial) g.set(random.between(0, g.count() - 1), value);
  context += " prune n" + std::to_string(size[0]) + "c" + std::to_string(size[1]) + "h" +
             std::to_string(size[2]) + "w" + std::to_string(size[3]) + (planes ? " planes" : "");
  const std::vector<float> taus = random_taus(random, dtype, spec, size[0]);
  Tensor expected = g;
  const int64_t found = prune_defined(expected, spec, taus);
  const PruneShape shape = {size[0], size[1], size[2], size[3], !planes};
  const std::string case_context = context;
  Tensor finite = g;  // and nothing so large that others do not count
  for (int64_t i = 0; i < finite.count(); ++i)
    if (!(fabsf(finite.get(i)) < 1e30f)) finite.set(i, 1.0f);
  double sum = 0;
  for (const IsaKernels* isa : isas) {
    context = case_context + " " + isa->name;
    Wrapped kernels = wrap(*isa, std::make_integer_sequence<int, kMost>());
    const TaskPool pool = random_pool(random);
    Tensor out(dtype, size, planes ? kPlanes : kChannelsLast, random);
    if (prune(kernels.prune, pool, g.data(), dtype, shape, spec, or_null(taus), out.data()) !=
        found)
      fail("number of non-zeros");
    expect_same_bits("pruned", out, expected);
    Tensor in_place = g;
    prune(kernels.prune, pool, in_place.data(), dtype, shape, spec, or_null(taus), in_place.data());
    expect_same_bits("pruned in place", in_place, expected);
    const AbsSum total = abs_sum(kernels.prune, pool, finite.data(), dtype, finite.count());
    if (isa == isas.front()) sum = total.sum;
    if (total.sum != sum)
      fail("abs_sum " + std::to_string(total.sum) + " instead of " + std::to_string(sum));
  }
  context = case_context;
  double near = 0;
  for (int64_t i = 0; i < finite.count(); ++i) near += fabs(static_cast<double>(finite.get(i)));
  if (!(fabs(sum - near) <= 1e-11 * near)) fail("abs_sum of " + std::string(isas.front()->name));
}

// Geometries that the kernels take. Those of `separable` are depthwise.
ConvProblem random_problem(Random& random, bool separable, int64_t most_macs) {
  for (;;) {
    ConvProblem problem = {};
    problem.groups = separable ? random.size(70) : random.pick({1, 1, 1, 1, 2, 3});
    const int64_t channels =
        random.pick({random.size(80), random.size(9) * 8, random.size(3) * 64});
    problem.n = random.between(0, 4);
    problem.c = problem.groups * (separable ? 1 : std::max<int64_t>(1, channels / problem.groups));
    problem.k = problem.groups * random.size(separable ? 3 : 100);
    problem.h = random.size(17);
    problem.w = random.pick({random.size(33), random.between(16, 48)});
    const bool window = random.chance(0.4);
    problem.r = window ? 3 : random.size(7);
    problem.s = window ? 3 : random.size(7);
    problem.stride_h = random.pick({1, 1, 2, 3});
    problem.stride_w = random.pick({1, 1, 2, 3});
    problem.pad_h = random.between(0, 3);
    problem.pad_w = random.between(0, 3);
    problem.dil_h = window ? 1 : random.between(1, 2);
    problem.dil_w = window ? 1 : random.between(1, 2);
    if (separable && random.chance(0.5)) {  // any number of taps at once
      problem.r = problem.stride_w = 1;
      problem.s = random.between(1, kMostTaps);
    }
    if (problem.h + 2 * problem.pad_h <= problem.dil_h * (problem.r - 1)) continue;
    if (problem.w + 2 * problem.pad_w <= problem.dil_w * (problem.s - 1)) continue;
    const int64_t macs = problem.n * problem.k * problem.p() * problem.q() * problem.r * problem.s *
                         (problem.c / problem.groups);
    if (macs <= most_macs) return problem;
  }
}

std::string text(const ConvProblem& p) {
  char result[200];
  snprintf(result, sizeof(result), " n%dc%dh%dw%dk%dr%ds%du%dx%dp%dx%dd%dx%dg%d", int(p.n),
           int(p.c), int(p.h), int(p.w), int(p.k), int(p.r), int(p.s), int(p.stride_h),
           int(p.stride_w), int(p.pad_h), int(p.pad_w), int(p.dil_h), int(p.dil_w), int(p.groups));
  return result;
}

// The operands of a convolution and what its gradients have to be.
struct Convolution {
  Convolution(Random& random, bool separable, bool any_planes)
      : problem(random_problem(random, separable, 300000)),
        dtype(random.pick({DType::kFloat32, DType::kBFloat16})),
        integers(random.chance(0.5)),
        may_be_planes(any_planes || dtype == DType::kFloat32),
        planes{layout(random), layout(random), layout(random)},
        x(dtype, {problem.n, problem.c, problem.h, problem.w}, planes[0] ? kPlanes : kChannelsLast,
          random),
        w(dtype, {problem.k, problem.c / problem.groups, problem.r, problem.s}, kPlanes, random),
        g(dtype, {problem.n, problem.k, problem.p(), problem.q()},
          planes[1] ? kPlanes : kChannelsLast, random),
        dx(x.count()),
        dw(w.count()) {
    context += text(problem) + (dtype == DType::kFloat32 ? " float32" : " bfloat16");
    if (random.chance(0.5))
      w = Tensor(dtype, {w.size(0), w.size(1), w.size(2), w.size(3)}, {3, 1, 0, 2}, random);
    fill(x, random, 1.0, integers);
    fill(w, random, 1.0, integers);
    fill(g, random, separable ? 1.0 : random.pick({0.02, 0.1, 0.4, 1.0}), integers);
  }
  bool layout(Random& random) const { return may_be_planes && random.chance(0.5); }
  Tensor grad_input(Random& random) const {
    return Tensor(dtype, {x.size(0), x.size(1), x.size(2), x.size(3)},
                  planes[2] ? kPlanes : kChannelsLast, random);
  }
  Tensor grad_weight(Random& random) const {
    return Tensor(dtype, {w.size(0), w.size(1), w.size(2), w.size(3)}, {1, 3, 2, 0}, random);
  }

  ConvProblem problem;
  DType dtype;
  bool integers, may_be_planes;
  bool planes[3];  // x, g and the gradient of x: else channels_last
  Tensor x, w, g;
  Sums dx, dw;
};

WeightStrides strides(const Tensor& w) {
  return {w.stride(0), w.stride(1), w.stride(2), w.stride(3)};
}

void check_convolution(Random& random, const std::vector<const IsaKernels*>& isas) {
  Convolution c(random, false, false);
  const PruneSpec spec = random_spec(random, c.dtype, random.pick({1.0f, 2.0f}));
  const bool prunes = random.chance(0.5);
  const std::vector<float> taus = random_taus(random, c.dtype, spec, c.problem.n);
  Tensor pruned = c.g;
  if (prunes) prune_defined(pruned, spec, taus);
  convolve_backward(c.problem, c.x, c.w, pruned, c.dx, c.dw);
  const std::string case_context = context;
  for (const IsaKernels* isa : isas) {
    context = case_context + " " + isa->name;
    if (const char* reason = conv_refusal(isa->conv, c.problem)) fail(reason);
    Wrapped kernels = wrap(*isa, std::make_integer_sequence<int, kMost>());
    Tensor dx = c.grad_input(random), dw = c.grad_weight(random);
    Tensor kept(c.dtype, {c.g.size(0), c.g.size(1), c.g.size(2), c.g.size(3)},
                c.planes[1] ? kPlanes : kChannelsLast, random);
    ConvBackward call = {};
    call.problem = c.problem;
    call.dtype = call.weight_dtype = call.grad_weight_dtype = c.dtype;
    call.grad_output = c.g.data();
    call.prune = prunes ? &spec : nullptr;
    call.taus = or_null(taus);
    call.pruned = prunes ? kept.data() : nullptr;
    call.grad_output_planes = c.planes[1];
    call.weight = c.w.data();
    call.weight_strides = strides(c.w);
    call.grad_input = dx.data();
    call.grad_input_planes = c.planes[2];
    call.input = c.x.data();
    call.input_planes = c.planes[0];
    call.grad_weight = dw.data();
    call.grad_weight_strides = strides(dw);
    conv_backward(wrapped_conv(kernels), kernels.prune, random_pool(random), call);
    if (prunes) expect_same_bits("pruned", kept, pruned);
    expect_sums("AGB", dx, c.dx, c.integers);
    expect_sums("WGC", dw, c.dw, c.integers);
  }
}

void check_depthwise(Random& random, const std::vector<const IsaKernels*>& isas) {
  Convolution c(random, true, true);
  convolve_backward(c.problem, c.x, c.w, c.g, c.dx, c.dw);
  if (const char* reason = depthwise_refusal(c.problem)) fail(reason);
  const std::string case_context = context;
  for (const IsaKernels* isa : isas)
    for (const bool agb : {true, false})
      for (const bool wgc : {true, false}) {
        context = case_context + " depthwise " + isa->name;
        Wrapped kernels = wrap(*isa, std::make_integer_sequence<int, kMost>());
        Tensor dx = c.grad_input(random), dw = c.grad_weight(random);
        DepthwiseBackward call = {};
        call.problem = c.problem;
        call.dtype = call.weight_dtype = call.grad_weight_dtype = c.dtype;
        call.grad_output = {c.g.data(), c.planes[1]};
        if (agb) {
          call.weight = c.w.data();
          call.weight_strides = strides(c.w);
          call.grad_input = {dx.data(), c.planes[2]};
        }
        if (wgc) {
          call.input = {c.x.data(), c.planes[0]};
          call.grad_weight = dw.data();
          call.grad_weight_strides = strides(dw);
        }
        if (agb || wgc) depthwise_backward(kernels.depthwise, random_pool(random), call);
        if (agb) expect_sums("AGB", dx, c.dx, c.integers);
        if (wgc) expect_sums("WGC", dw, c.dw, c.integers);
      }
}

void check_layout(Random& random, const std::vector<const IsaKernels*>& isas) {
  const int64_t size[] = {random.between(1, 3), random.size(70), random.size(9), random.size(70)};
  Tensor source(DType::kFloat32, size, kPlanes, random);
  fill(source, random, 1.0, false);
  const std::string case_context = context + " layout";
  for (const IsaKernels* isa : isas) {
    context = case_context + " " + isa->name;
    Tensor there(DType::kFloat32, size, kChannelsLast, random),
        back(DType::kFloat32, size, kPlanes, random);
    const int64_t pixels = size[2] * size[3];
    const auto data = [](Tensor& tensor) { return static_cast<float*>(tensor.data()); };
    transpose_images(isa->conv, random_pool(random), data(source), size[0], size[1], pixels,
                     data(there));
    expect_same_bits("to channels_last", there, source);
    transpose_images(isa->conv, random_pool(random), data(there), size[0], pixels, size[1],
                     data(back));
    expect_same_bits("to planes", back, source);
  }
}

}  // namespace

int main(int arguments, char** argument) {
  if (arguments < 3) return fprintf(stderr, "usage: kernel_parity CASES SEED [FAULT]\n"), 2;
  const int64_t cases = atoll(argument[1]);
  const auto seed = static_cast<uint64_t>(atoll(argument[2]));
  if (arguments > 3) fault = argument[3];
  const std::vector<const IsaKernels*> isas = supported_kernels();
  for (int64_t number = 0; number < cases; ++number) {
    Random random(seed, static_cast<uint64_t>(number));
    context = "case " + std::to_string(number) + " of seed " + std::to_string(seed);
    const int64_t kind = number % 8;
    (kind < 2    ? check_prune
     : kind == 2 ? check_layout
     : kind < 5  ? check_depthwise
                 : check_convolution)(random, isas);
  }
  // Else a result that is right says nothing about it.
  context = "all cases";
  for (const IsaKernels* isa : isas) {
    const std::pair<const char*, int> families[] = {
        {"agb", isa->conv.agb_count}, {"wgc", isa->conv.wgc_count}, {"depthwise", 3 * kMostTaps}};
    for (const auto& [family, count] : families)
      for (int i = 0; i < count; ++i) {
        const std::string kernel = std::string(isa->name) + " " + family + " " + std::to_string(i);
        if (!calls.count(kernel)) fail("none ran " + kernel + "; run more of them");
      }
  }
  printf("%lld cases agree:", static_cast<long long>(cases));
  for (const IsaKernels* isa : isas) printf(" %s", isa->name);
  printf("\n");
}
