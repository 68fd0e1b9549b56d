// A router on plain arrays: logits → scores → choice → weights in one pass over each token, and back.
//
// Shapes: T tokens, E experts, K top_k, G groups.
//     s = softmax(logits) or σ(logits)                                     [T, E]
//     ids = the K largest of s + selection_bias within the best groups; of the logits where there is neither bias nor
//           groups; ties: the lower id; NaN counts as greater than any number
//     w[k] = s[ids[k]], or divided by (Σ_k + epsilon), or the softmax over the chosen logits; × scale
//     scores = s, or s / (Σ s + 1e-20) for the sigmoid
// Everything is computed in fp32. A token's numbers depend on its own row alone, so results are the same at any thread
// count.
#pragma once

#include "experts.h"

namespace turnout::kernels {

enum class RouterScore { softmax, sigmoid };
enum class RouterWeight { normalized, probability, softmax_of_topk };

/// The sizes that are served; beyond them rows no longer fit the buffers on the stack.
constexpr int64_t kMostExperts = 1024, kMostChoices = 64;

/// One call's input. Nothing is owned.
struct RouterProblem {
  int64_t tokens = 0, num_experts = 0, top_k = 0;
  DType dtype = DType::f32;  ///< of the logits: f32 or bf16
  const void* logits = nullptr;
  int64_t stride = 0;  ///< elements from row to row of the logits; within a row they are neighbours
  RouterScore score = RouterScore::softmax;
  RouterWeight weights = RouterWeight::normalized;
  float epsilon = 0, scale = 1;
  const float* selection_bias = nullptr;  ///< [E], or null
  int64_t groups = 1, kept_groups = 1, group_top = 1;
  bool mask_by_zero = false;  ///< groups left out count as 0, not as −∞
};

/// What forward makes: all contiguous.
struct RouterOutput {
  int64_t* ids;    ///< [T, K]
  float* weights;  ///< [T, K]
  float* scores;   ///< [T, E]
};

/// What backward reads and writes.
struct RouterGradients {
  const int64_t* ids;         ///< [T, K] of forward
  const float* scores;        ///< [T, E] of forward
  const float* grad_weights;  ///< [T, K], or null: zeros
  const float* grad_scores;   ///< [T, E], or null: zeros
  void* grad_logits;          ///< [T, E] contiguous, of the logits' type
};

/// What one instruction set provides: tokens [begin, end).
struct RouterStages {
  void (*forward)(const RouterProblem&, const RouterOutput&, int64_t begin, int64_t end);
  void (*backward)(const RouterProblem&, const RouterGradients&, int64_t begin, int64_t end);
};
extern const RouterStages kAvx512Router, kAvx2Router, kPortableRouter;

struct Implementation;  // table.h

/// The stages that run where this implementation of the experts does; null for the reference.
const RouterStages* router_stages(const Implementation& implementation);

void route(const RouterStages& stages, const RouterProblem& problem, const RouterOutput& out,
           const ParallelFor& parallel);
void route_backward(const RouterStages& stages, const RouterProblem& problem, const RouterGradients& gradients,
                    const ParallelFor& parallel);

}  // namespace turnout::kernels
