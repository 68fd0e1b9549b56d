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

TEST(Table, DoubleIsServedByTheReferenceAlone) {
  Config c;
  c.dtype = DType::f64;
  const Bank wide(c);
  Buffer y(DType::f64, c.tokens * c.hidden);
  EXPECT_THROW(forward(find("portable"), wide.problem(), nullptr, y.data(), nullptr, ParallelFor{}),
               std::invalid_argument);
  EXPECT_THROW(PackedLayout(find("portable"), wide.problem()), std::invalid_argument);
  EXPECT_EQ(PackedLayout(find("reference"), wide.problem()).words(), "reference f64 plain 4x32x32 v2");
}

TEST(Table, PackedWeightsThatDoNotFitAreRefusedInWords) {
  Config c;
  const Bank bank(c);
  const Implementation &portable = find("portable"), &reference = find("reference");
  const ExpertsProblem q = bank.problem();
  const PackedLayout layout(portable, q);
  Buffer memory(DType::f32, static_cast<int64_t>(layout.bytes() / 4)), y(DType::f32, c.tokens * c.hidden);
  pack(portable, q, memory.data(), ParallelFor{});
  const auto message = [](auto&& call) -> std::string {
    try {
      call();
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "nothing thrown";
  };
  const PackedExperts packed(layout, memory.data(), layout.bytes());
  const auto run = [&](const Implementation& impl, const ExpertsProblem& problem) {
    return message([&] { forward(impl, problem, &packed, y.data(), nullptr, ParallelFor{}); });
  };
  EXPECT_EQ(run(portable, q), "nothing thrown");
  EXPECT_EQ(run(reference, q),
            "packed experts are 'portable f32 plain 4x32x32 v2', expected 'reference f32 plain 4x32x32 v2'");
  ExpertsProblem other = q;
  other.activation = Activation::swiglu;
  EXPECT_NE(run(portable, other).find("expected 'portable f32 gated 4x32x32 v2'"), std::string::npos);
  other = q;
  other.ffn = 31;  // as many bytes, once padded
  EXPECT_NE(run(portable, other).find("expected 'portable f32 plain 4x32x31 v2'"), std::string::npos);
  EXPECT_NE(message([&] { PackedExperts(layout, memory.data(), layout.bytes() - 64); }).find("bytes, expected"),
            std::string::npos);
  EXPECT_NE(message([&] { PackedExperts(layout, memory.data() + 4, layout.bytes()); }).find("aligned to 64"),
            std::string::npos);
  EXPECT_NE(message([&] { pack(portable, q, memory.data() + 4, ParallelFor{}); }).find("aligned to 64"),
            std::string::npos);
}

}  // namespace
}  // namespace turnout::kernels::test
