// Starts the tests with c10d's own traces switched off: failures are what many of them are about.
#include <c10/util/Logging.h>

#include <gtest/gtest.h>

#include <cstdlib>

int main(int argc, char** argv) {
  setenv("TORCH_CPP_LOG_LEVEL", "FATAL", /*overwrite=*/0);
  c10::initLogging();  // reads it; Python's torch does this when it is imported
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
