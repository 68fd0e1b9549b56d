// Upcycling: an MoE layer made of a trained dense feed-forward block.
#pragma once

#include <turnout/moe.h>

#include <cstdint>

namespace turnout {

/// An MoE layer that computes what a dense block does, from which training goes on.
///
/// The dense block is cut along ffn into `slices` of equal width, and each slice stands in num_experts / slices experts
/// (virtual groups: experts c · slices … c · slices + slices − 1 are one copy of the block). The gate is drawn as a new
/// MoE layer's, with one row a copy that the copy's experts share: their logits are equal, so the top_k choices are
/// top_k / slices whole copies. `down` is scaled so that the weights of the chosen experts add up to the dense block.
/// slices = 1: plain copies.
///
/// @param dense its weights are copied; type and device carry over
/// @param options routing and losses as in MoE; hidden, ffn, activation and bias are taken from `dense`
/// @return a layer whose output is dense(x) up to rounding, while its gate is as it was made: for weights that sum to a
///   constant (RouterWeights::normalized, softmax_of_topk) with any logits, for RouterWeights::probability only where
///   all logits are equal
/// @throws c10::ValueError when num_experts, top_k or the block's ffn is no multiple of `slices`, when experts have a
///   capacity (what is dropped is missing), when the selection is not topk, or a shared expert is asked for
/// Source: arXiv:2212.05055 (copies); arXiv:2410.07524 (slices, virtual groups, scaling).
MoE upcycle(const FeedForward& dense, MoEOptions options, int64_t slices = 1);

}  // namespace turnout
