// Text to train on, and text held out: whole files that training never sees.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace turnout {

struct TextOptions {
  int64_t limit = int64_t{64} << 20;  ///< bytes; files beyond it, in order of their names, are left out
  std::string extension;              ///< taken from folders: only names that end so; empty = all
};

struct ByteText {
  std::string training;                     ///< contents of the training files, one after the other
  std::string held_out;                     ///< contents of the held-out files
  std::vector<std::string> training_files;  ///< names relative to the folder, or the file's own name
  std::vector<std::string> held_out_files;

  /// Depends on every byte of both parts: tells whether a run goes on with the text that it began with.
  uint64_t digest() const;
};

/// Reads files and folders (with all below them) in sorted order.
///
/// A file is held out when a hash of its relative name says so, one in twenty; the file with the smallest hash where
/// none is. A single file is cut: its last tenth is held out.
/// Left out in folders: hidden names, folders called test, tests, __pycache__, site-packages or dist-packages,
/// symbolic links, empty files and binary ones (with a NUL among the first 8192 bytes). A file given by name is
/// always read. A file that is found twice, by overlapping paths, is taken where it is found first.
/// @throws FileError naming what is missing or unreadable; c10::ValueError when no text is found
ByteText load_text(const std::vector<std::string>& paths, const TextOptions& options = {});

}  // namespace turnout
