// Rows that are wanted soon, brought into the second-level cache a few lines at a time between pieces of arithmetic. One
// head's rows of a tensor lie too far apart for the processor to foresee them, and a burst of fetches would wait as long as
// the reads it spares.
#pragma once

#include "simd.h"

namespace gdn2 {
namespace GDN2_ISA {

class Ahead {
 public:
  static constexpr int MOST = 13;

  // Begins anew: rows of `tokens` consecutive tokens, all of them within `calls` calls of fetch().
  void begin(int64_t tokens, int64_t calls) {
    tokens_ = tokens;
    calls_ = calls;
    count_ = i_row_ = 0;
    i_token_ = byte_ = lines_ = each_call_ = 0;
  }

  // `channels` of a tensor's rows, from the one at `at` of a token; at most MOST of these.
  template <class T>
  void add_rows(const View& x, int64_t batch, int64_t token, int64_t at, int64_t channels) {
    const int64_t size = sizeof(T), bytes = channels * size;
    rows_[count_++] = {reinterpret_cast<const char*>(row<T>(x, batch, token, at)), x.token * size, bytes};
    lines_ += tokens_ * ceil_div(bytes, CACHE_LINE);
    each_call_ = ceil_div(lines_, calls_);
  }

  void fetch() {
    for (int64_t left = each_call_; left > 0 && i_token_ < tokens_;) {
      const Rows& x = rows_[i_row_];
      const char* const data = x.data + i_token_ * x.stride;
      const int64_t end = smaller(x.bytes, byte_ + left * CACHE_LINE);
      for (; byte_ < end; byte_ += CACHE_LINE, --left) __builtin_prefetch(data + byte_, 0, 2);
      if (byte_ < x.bytes) return;
      byte_ = 0;
      if (++i_row_ < count_) continue;
      i_row_ = 0;
      ++i_token_;
    }
  }

 private:
  struct Rows {
    const char* data;
    int64_t stride, bytes;
  };
  Rows rows_[MOST];
  int count_ = 0, i_row_ = 0;
  int64_t tokens_ = 0, calls_ = 1, lines_ = 0, each_call_ = 0, i_token_ = 0, byte_ = 0;
};

}  // namespace GDN2_ISA
}  // namespace gdn2
