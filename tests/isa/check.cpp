#include "check.h"

#include <cstdio>

namespace mprec::test {
namespace {
int passed, failed;
}

Case::Case(const std::string& name) {
  std::printf("%s ... ", name.c_str());
  std::fflush(stdout);
}

Case::~Case() {
  const bool ok = failures_ == 0 && checks_ > 0;
  ++(ok ? passed : failed);
  if (ok && worst_ > 0)
    std::printf("ok (%lld checks, worst error %.2f of its bound)\n", static_cast<long long>(checks_), worst_);
  else if (ok)
    std::printf("ok (%lld checks)\n", static_cast<long long>(checks_));
  else
    std::printf("FAILED (%lld of %lld checks; first: %s)\n", static_cast<long long>(failures_),
                static_cast<long long>(checks_), checks_ ? first_failure_.c_str() : "nothing was checked");
}

int finish() {
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}

}  // namespace mprec::test
