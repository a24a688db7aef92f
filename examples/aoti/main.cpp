// Scores batches with a model that AOTInductor compiled, in a process without Python:
//   score libmprec_ops.so model.pt2 INPUTS OUTPUT [INPUTS OUTPUT ...]
// INPUTS is a tuple of tensors that torch.save wrote, the model's arguments; OUTPUT is written for
// torch.load. Both files come from and go to Python only in this example: a server would make its tensors
// itself (torch::from_blob).
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>
#include <torch/csrc/stable/c/shim.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

std::vector<at::Tensor> read_tensors(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const c10::IValue tuple = torch::jit::pickle_load(bytes);
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& value : tuple.toTupleRef().elements()) tensors.push_back(value.toTensor());
  return tensors;
}

void write_tensor(const std::string& path, const at::Tensor& tensor) {
  const std::vector<char> bytes = torch::jit::pickle_save(tensor);
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!file.flush()) throw std::runtime_error("cannot write " + path);
}

// The operators that the model calls: loading the library registers them.
void load_operators(const char* path) {
  if (!dlopen(path, RTLD_NOW)) throw std::runtime_error(dlerror());
}

// What an operator had to say. The compiled model only says that a call failed, and where in its own code.
std::string last_words() {
#if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_13_0
  return torch_exception_get_what_without_backtrace();
#else
  return "";
#endif
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5 || argc % 2 == 0) {
    std::cerr << "usage: score libmprec_ops.so model.pt2 INPUTS OUTPUT [INPUTS OUTPUT ...]\n";
    return 2;
  }
  try {
    load_operators(argv[1]);
    torch::inductor::AOTIModelPackageLoader model(argv[2]);
    for (int i = 3; i < argc; i += 2) write_tensor(argv[i + 1], model.run(read_tensors(argv[i])).at(0));
  } catch (const std::exception& error) {
    std::cerr << "score: " << error.what() << "\n" << last_words() << "\n";
    return 1;
  }
}
