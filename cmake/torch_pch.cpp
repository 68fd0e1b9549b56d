// Compiled only for the sake of its precompiled header, which every target over torch reuses.
