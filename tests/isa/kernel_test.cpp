// Holds the kernels of every ISA that this CPU can run against their formulas in float64, with arrays that
// end where their page ends. Linked from the wheel's own object files; native or under tests/isa/emulator.
//   kernel_test [--threads N] [ISA ...]     default: one thread, every ISA
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <set>
#include <vector>

#include "check.h"
#include "registry.h"
#include "suites.h"

using namespace mprec;

namespace {

Isa best_runnable() {
  Isa best = Isa::scalar;
  for (Isa isa : all_isas)
    if (can_run(isa)) best = isa;
  return best;
}

void test_dispatch() {
  test::Case c("dispatch");
  c.expect(kernels().isa == best_runnable(), "in use at start: ", isa_name(kernels().isa));
  for (Isa isa : all_isas) {
    c.expect(parse_isa(isa_name(isa)) == isa, "parse ", isa_name(isa));
    const Isa before = kernels().isa;
    try {
      use_isa(isa);
      c.expect(can_run(isa) && kernels().isa == isa, "use_isa ", isa_name(isa));
    } catch (const std::invalid_argument&) {
      c.expect(!can_run(isa) && kernels().isa == before, "refusal of ", isa_name(isa));
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  int threads = 1;
  std::vector<Isa> wanted;
  for (int i = 1; i < argc; ++i)
    if (std::strcmp(argv[i], "--threads") == 0 && i + 1 < argc)
      threads = std::atoi(argv[++i]);
    else
      wanted.push_back(parse_isa(argv[i]));
  if (wanted.empty()) wanted.assign(std::begin(all_isas), std::end(all_isas));

  std::printf("# %s:", cpu_model().c_str());
  for (Isa isa : all_isas)
    if (can_run(isa)) std::printf(" %s", isa_name(isa));
  std::printf("; %d thread(s)\n", threads);
  test_dispatch();
  test::parallel_suite(threads);
  std::set<const void*> tested;  // an ISA may share another's kernels
  for (Isa isa : wanted) {
    if (!can_run(isa)) {
      std::printf("# %s: this CPU cannot run it\n", isa_name(isa));
      continue;
    }
    use_isa(isa);
    const Kernels& table = kernels();
    if (tested.insert(table.embedding_bag).second) test::embedding_bag_suite(isa_name(isa), threads);
    if (tested.insert(table.gradient).second) test::gradient_suite(isa_name(isa), threads);
    if (tested.insert(table.dhe).second) {
      test::dhe_suite(isa_name(isa), threads);
      test::cache_suite(isa_name(isa), threads);
    }
    if (tested.insert(table.dense).second) test::dense_suite(isa_name(isa), threads);
  }
  return test::finish();
}
