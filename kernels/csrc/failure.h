// How a target's functions say what went wrong: a status, and words for the caller's buffer.
#ifndef MLA_FAILURE_H_
#define MLA_FAILURE_H_

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

namespace mla {

class Failure {
 public:
  // `text` may be null: then nobody wants the words.
  Failure(char* text, size_t bytes) : text_(text), bytes_(bytes) {}
  int32_t operator()(int32_t status, const char* format, ...) const __attribute__((format(printf, 3, 4))) {
    if (text_ != nullptr && bytes_ > 0) {
      va_list arguments;
      va_start(arguments, format);
      vsnprintf(text_, bytes_, format, arguments);
      va_end(arguments);
    }
    return status;
  }

 private:
  char* text_;
  size_t bytes_;
};

}  // namespace mla

#endif  // MLA_FAILURE_H_
