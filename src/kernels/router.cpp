// The router's driver: tokens over threads.
#include "router.h"

#include "table.h"

namespace turnout::kernels {
namespace {

// below this many logits, waking threads costs more than routing
constexpr int64_t kSmall = 1 << 13;

template <class Body>
void over_tokens(const RouterProblem& problem, const ParallelFor& parallel, const Body& body) {
  if (problem.tokens * problem.num_experts < kSmall) return body(int64_t{0}, problem.tokens);
  parallel(problem.tokens, body);
}

}  // namespace

const RouterStages* router_stages(const Implementation& implementation) {
  const std::string_view name = implementation.name;
#if defined(TURNOUT_KERNELS_X86)
  if (name == "avx512_bf16" || name == "avx512") return &kAvx512Router;
  if (name == "avx2") return &kAvx2Router;
#endif
  return name == "portable" ? &kPortableRouter : nullptr;
}

void route(const RouterStages& stages, const RouterProblem& problem, const RouterOutput& out,
           const ParallelFor& parallel) {
  over_tokens(problem, parallel, [&](int64_t begin, int64_t end) { stages.forward(problem, out, begin, end); });
}

void route_backward(const RouterStages& stages, const RouterProblem& problem, const RouterGradients& gradients,
                    const ParallelFor& parallel) {
  over_tokens(problem, parallel, [&](int64_t begin, int64_t end) { stages.backward(problem, gradients, begin, end); });
}

}  // namespace turnout::kernels
