// Ask for memory before it is needed.
//
// A processor that sees one stream read in order fetches ahead by itself, though not past the end of a page. Of many
// streams that are read a piece at a time, and of one that is read fast, it fetches too little.
#pragma once
#include "common.h"

namespace fasttrain {
inline namespace FT_ISA {

constexpr i64 kLine = 64;  // bytes

HOST_DEVICE void fetch(const char* at, i64 bytes) {
  for (i64 b = 0; b < bytes; b += kLine) __builtin_prefetch(at + b, 0, 3);
  asm volatile("");  // GCC drops a function that does nothing but prefetch
}

// Stretches of memory that are asked for little by little: a core has a few dozen requests under way at most, and waits
// where more are made at once.
template <int Most>
class Fetch {
 public:
  HOST_DEVICE void add(const char* at, i64 bytes) {
    at_[count_] = at;
    bytes_[count_++] = bytes;
    total_ += bytes;
  }

  HOST_DEVICE i64 total() const { return total_; }

  // The next `bytes`, a multiple of a line.
  void some(i64 bytes) {
    while (bytes > 0 && current_ < count_) {
      const i64 left = bytes_[current_] - done_, now = bytes < left ? bytes : left;
      fetch(at_[current_] + done_, now);
      bytes -= now;
      done_ += now;
      if (done_ == bytes_[current_]) ++current_, done_ = 0;
    }
  }

 private:
  const char* at_[Most];
  i64 bytes_[Most];
  i64 total_ = 0, done_ = 0;
  int count_ = 0, current_ = 0;
};

}  // namespace FT_ISA
}  // namespace fasttrain
