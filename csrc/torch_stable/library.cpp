// torch.ops.mprec for processes without Python: schemas and CPU implementations, registered when the library
// is loaded. In a process where mprec's Python package has defined its operators, the library leaves all as
// it is.
#include <torch/csrc/stable/library.h>

#include <string>

#include "torch_stable/operators.h"

namespace mprec::stable {
namespace {

struct Operator {
  const char* schema;  // Python's, word for word (tests/test_torch_stable.py compares them)
  void (*run)(StableIValue*, uint64_t, uint64_t);

  std::string name() const { return std::string(schema).substr(0, std::string(schema).find('(')); }
};

const Operator operators[] = {
    {"embedding_bag(Tensor weight, Tensor indices, Tensor offsets, int mode=0, "
     "Tensor? per_sample_weights=None, bool include_last_offset=False, int padding_idx=-1, "
     "bool scale_grad_by_freq=False, bool sparse=False) -> Tensor",
     TORCH_BOX(&embedding_bag)},
    {"embedding_bag_multi(Tensor[] weights, Tensor indices, Tensor offsets, int mode=0, "
     "Tensor? per_sample_weights=None, int[]? features=None, int? num_features=None, bool sparse=False) "
     "-> Tensor",
     TORCH_BOX(&embedding_bag_multi)},
    {"quantized_embedding_bag_multi(Tensor[] rows, int[] bits, Tensor indices, Tensor offsets, int mode=0, "
     "Tensor? per_sample_weights=None, int[]? features=None, int? num_features=None) -> Tensor",
     TORCH_BOX(&quantized_embedding_bag_multi)},
    {"dhe_bag(Tensor indices, Tensor offsets, Tensor coefficients, Tensor[] weights, Tensor[] biases, "
     "str family, str activation, str last_activation, int mode=0, Tensor? per_sample_weights=None, "
     "bool include_last_offset=False, int padding_idx=-1) -> Tensor",
     TORCH_BOX(&dhe_bag)},
    {"dhe_bag_multi(Tensor indices, Tensor offsets, Tensor[] coefficients, Tensor[] weights, "
     "Tensor[] biases, int[] layers, str family, str activation, str last_activation, int mode=0, "
     "Tensor? per_sample_weights=None, int[]? features=None, int? num_features=None) -> Tensor",
     TORCH_BOX(&dhe_bag_multi)},
    {"packed_dhe_bag_multi(Tensor indices, Tensor offsets, Tensor[] coefficients, Tensor[] weights, "
     "Tensor[] biases, int[] layers, str family, str activation, str last_activation, str[] precisions, "
     "int mode=0, Tensor? per_sample_weights=None, int[]? features=None, int? num_features=None) -> Tensor",
     TORCH_BOX(&packed_dhe_bag_multi)},
    {"mlp(Tensor input, Tensor[] weights, Tensor[] biases, str activation, str last_activation) -> Tensor",
     TORCH_BOX(&mlp)},
    {"dot_interaction(Tensor vectors, bool self_interaction=False, Tensor? first=None) -> Tensor",
     TORCH_BOX(&dot_interaction)},
};

// The schemas, for as long as the library is loaded. All of them or, if one is there already, none.
class Schemas {
 public:
  Schemas() {
    TORCH_ERROR_CODE_CHECK(aoti_torch_library_init_fragment("mprec", __FILE__, __LINE__, &library_));
    for (const Operator& op : operators)
      if (aoti_torch_library_def(library_, op.schema) != TORCH_SUCCESS) {
        undo();
        return;
      }
  }
  ~Schemas() { undo(); }
  bool are_ours() const { return library_ != nullptr; }

 private:
  void undo() {
    if (library_) aoti_torch_delete_library_object(library_);
    library_ = nullptr;
  }
  TorchLibraryHandle library_ = nullptr;
};

Schemas schemas;  // before the implementations, which are registered in the same order

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mprec, CPU, library) {
  if (!schemas.are_ours()) return;
  for (const Operator& op : operators) library.impl(op.name().c_str(), op.run);
}

}  // namespace mprec::stable
