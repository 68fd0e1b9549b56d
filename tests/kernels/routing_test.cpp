// Top-k and grouping: ties, NaN, empty experts, choices not sent, many threads.
#include <gtest/gtest.h>

#include "bank.h"

namespace turnout::kernels::test {
namespace {

std::vector<int64_t> top(std::vector<float> scores, int64_t k) {
  std::vector<int64_t> ids(static_cast<size_t>(k));
  const int64_t n = static_cast<int64_t>(scores.size());
  topk(scores.data(), n, 1, n, k, ids.data(), ParallelFor{});
  return ids;
}

using Ids = std::vector<int64_t>;

TEST(TopK, LargestFirstLowerIdOnTies) {
  EXPECT_EQ(top({1, 3, 2, 3, 0}, 3), (Ids{1, 3, 2}));
  EXPECT_EQ(top({5, 5, 5}, 2), (Ids{0, 1}));
  EXPECT_EQ(top({-INFINITY, -INFINITY}, 2), (Ids{0, 1}));
  EXPECT_EQ(top({0.f, -0.f, 1}, 3), (Ids{2, 0, 1}));
}

TEST(TopK, NaNComesFirstAndIdsStayDistinct) {
  EXPECT_EQ(top({1, NAN, 2, NAN}, 3), (Ids{1, 3, 2}));
  EXPECT_EQ(top({NAN, NAN, NAN}, 3), (Ids{0, 1, 2}));
}

struct Plan {
  Ids offsets, tokens, rows;
  int64_t bad;
};

Plan group(const Ids& ids, int64_t top_k, int64_t experts, int n_threads = 1) {
  Plan p{Ids(static_cast<size_t>(experts) + 1), Ids(ids.size(), -7), Ids(ids.size(), -7), 0};
  p.bad = plan(ids.data(), static_cast<int64_t>(ids.size()) / top_k, top_k, experts, p.offsets.data(), p.tokens.data(),
               p.rows.data(), threads(n_threads));
  return p;
}

TEST(Plan, ByHand) {
  const Plan p = group({2, 0, 0, -1, 2, 0}, 2, 4);  // three tokens, two choices; experts 1 and 3 get nothing
  EXPECT_EQ(p.bad, -1);
  EXPECT_EQ(p.offsets, (Ids{0, 3, 3, 5, 5}));
  EXPECT_EQ(p.tokens, (Ids{0, 1, 2, 0, 2, -1}));
  EXPECT_EQ(p.rows, (Ids{3, 0, 1, -1, 4, 2}));
}

TEST(Plan, NamesTheFirstBadId) {
  EXPECT_EQ(group({0, 1, 4, 9}, 2, 4).bad, 2);
  EXPECT_EQ(group({0, -2}, 2, 4).bad, 1);
}

TEST(Plan, SameAtAnyThreadCount) {
  std::mt19937 random(3);
  Ids ids(40000);
  for (int64_t& i : ids) i = static_cast<int64_t>(random() % 33) - 1;
  const Plan one = group(ids, 4, 32);
  for (int n : {2, 3, 8}) {
    const Plan p = group(ids, 4, 32, n);
    EXPECT_EQ(p.offsets, one.offsets);
    EXPECT_EQ(p.tokens, one.tokens);
    EXPECT_EQ(p.rows, one.rows);
  }
  ids[30001] = 77;
  ids[30003] = 78;
  EXPECT_EQ(group(ids, 4, 32, 8).bad, 30001);
}

}  // namespace
}  // namespace turnout::kernels::test
