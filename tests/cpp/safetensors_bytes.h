// Safetensors files written byte by byte, for tests of what no writer would write.
#pragma once

#include <cstdint>
#include <string>

namespace turnout::testing {

/// A file of this header and so many bytes of data, each 1.
inline std::string file_of(const std::string& header, size_t data_bytes = 0) {
  const uint64_t length = header.size();
  std::string file(reinterpret_cast<const char*>(&length), sizeof(length));
  return file + header + std::string(data_bytes, '\x01');
}

}  // namespace turnout::testing
