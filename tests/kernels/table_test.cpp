// Choice of an implementation: order, names, refusals, the environment.
#include <gtest/gtest.h>

#include <cstdlib>

#include "bank.h"

namespace turnout::kernels::test {
namespace {

TEST(Table, UnknownNameSaysWhatIsKnown) {
  try {
    find("sse9");
    FAIL();
  } catch (const std::invalid_argument& e) {
    EXPECT_NE(std::string(e.what()).find("portable"), std::string::npos) << e.what();
  }
}

TEST(Table, ReportsOneActiveAndAReasonForEachOther) {
  const std::vector<Candidate> lines = report();
  ASSERT_EQ(lines.size(), implementations().size());
  int taken = 0;
  for (const Candidate& c : lines) {
    if (c.refusal.empty()) {
      ++taken;
      EXPECT_EQ(c.implementation, &active());
    }
    std::printf("%-12s %s\n", c.implementation->name, c.refusal.empty() ? "active" : c.refusal.c_str());
  }
  EXPECT_EQ(taken, 1);
}

TEST(Table, ForcedImplementationRunsOrThrows) {
  // the choice is made once a process: each case in a child
  const auto child = [](const char* name) {
    setenv("TURNOUT_FORCE_ISA", name, 1);
    try {
      std::fprintf(stderr, "runs %s.", active().name);
    } catch (const std::invalid_argument& e) {
      std::fprintf(stderr, "refused: %s.", e.what());
    }
    std::exit(0);
  };
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_EXIT(child("reference"), testing::ExitedWithCode(0), "runs reference");
  EXPECT_EXIT(child("portable"), testing::ExitedWithCode(0), "runs portable");
  EXPECT_EXIT(child("fastest"), testing::ExitedWithCode(0), "refused: TURNOUT_FORCE_ISA.*'fastest'");
}

TEST(Table, ForeignPackedWeightsAndDoubleAreRefused) {
  Config c;
  const Bank bank(c);
  const PackedExperts packed(find("portable"), bank.problem(), ParallelFor{});
  Buffer y(DType::f32, c.tokens * c.hidden);
  EXPECT_THROW(forward(find("reference"), bank.problem(), &packed, y.data(), nullptr, ParallelFor{}),
               std::invalid_argument);
  c.dtype = DType::f64;
  const Bank wide(c);
  EXPECT_THROW(forward(find("portable"), wide.problem(), nullptr, y.data(), nullptr, ParallelFor{}),
               std::invalid_argument);
}

}  // namespace
}  // namespace turnout::kernels::test
