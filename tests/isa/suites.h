// One suite per family of kernels; each tests the table of registry.h that is in use.
#pragma once
#include <string>

namespace mprec::test {

// `isa` names the table in the report. The operators' own drivers run with `threads`.
void embedding_bag_suite(const std::string& isa, int threads);
void gradient_suite(const std::string& isa, int threads);
void dhe_suite(const std::string& isa, int threads);
void cache_suite(const std::string& isa, int threads);
void dense_suite(const std::string& isa, int threads);
// Of what they share their work with, once.
void parallel_suite(int threads);

}  // namespace mprec::test
