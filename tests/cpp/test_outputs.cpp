// Memory of large outputs: it serves the next tensor when the last user has gone, and not before.
#include "helpers.h"

#include <turnout/experts.h>
#include <turnout/runtime.h>

namespace turnout {
namespace {

/// 6 MB of packed weights: an output above the size from which memory is kept.
at::Tensor large(double value) {
  const ExpertWeights weights{{at::full({2, 512, 1024}, value)}, {at::full({2, 1024, 256}, value)}, {}, {}};
  return prepack(weights, Activation::swiglu).data;
}

TEST(LargeOutputs, TakeTheMemoryOfOnesThatDied) {
  release_scratch();
  auto first = large(1);
  const void* memory = first.data_ptr();
  const auto expected = first.clone();
  const int64_t bytes = first.numel();
  first.reset();
  const auto between = at::empty({bytes}, at::kByte);  // would take the address, were it unmapped
  const auto second = large(1);
  EXPECT_EQ(second.data_ptr(), memory);
  EXPECT_TRUE(second.equal(expected));
}

TEST(LargeOutputs, LeaveTheMemoryOfViewsAlone) {
  auto first = large(1);
  const auto view = first.slice(0, 64, 128);
  const auto expected = view.clone();
  first.reset();
  const auto second = large(2);
  EXPECT_FALSE(second.is_alias_of(view));
  EXPECT_TRUE(view.equal(expected));
}

TEST(LargeOutputs, AreReleasedOnRequest) {
  large(1);
  release_scratch();
  EXPECT_TRUE(large(3).equal(large(3)));
}

TEST(LargeOutputs, CanBeResizedAndMovedAsAnyTensor) {
  auto tensor = large(1);
  const int64_t bytes = tensor.numel();
  const auto before = tensor.clone();
  tensor.resize_({2 * bytes});
  EXPECT_TRUE(tensor.slice(0, 0, bytes).equal(before));
}

}  // namespace
}  // namespace turnout
