// The operators. Their arguments are those of the schemas in library.cpp, as torch's stable ABI hands them
// over.
#pragma once
#include <cstdint>
#include <optional>
#include <vector>

#include "torch_stable/tensors.h"

namespace mprec::stable {

using Tensors = std::vector<Tensor>;
using Numbers = std::vector<int64_t>;

// tables.cpp. The last two arguments of embedding_bag, and the last one of embedding_bag_multi, are for
// gradients, which there are none of here.
Tensor embedding_bag(const Tensor& weight, const Tensor& indices, const Tensor& offsets, int64_t mode,
                     const std::optional<Tensor>& per_sample_weights, bool include_last_offset,
                     int64_t padding_idx, bool scale_grad_by_freq, bool sparse);
Tensor embedding_bag_multi(const Tensors& weights, const Tensor& indices, const Tensor& offsets, int64_t mode,
                           const std::optional<Tensor>& per_sample_weights,
                           const std::optional<Numbers>& features, std::optional<int64_t> num_features,
                           bool sparse);
Tensor quantized_embedding_bag_multi(const Tensors& rows, const Numbers& bits, const Tensor& indices,
                                     const Tensor& offsets, int64_t mode,
                                     const std::optional<Tensor>& per_sample_weights,
                                     const std::optional<Numbers>& features,
                                     std::optional<int64_t> num_features);

// decoders.cpp
Tensor dhe_bag(const Tensor& indices, const Tensor& offsets, const Tensor& coefficients,
               const Tensors& weights, const Tensors& biases, StringHandle family, StringHandle activation,
               StringHandle last_activation, int64_t mode, const std::optional<Tensor>& per_sample_weights,
               bool include_last_offset, int64_t padding_idx);
Tensor dhe_bag_multi(const Tensor& indices, const Tensor& offsets, const Tensors& coefficients,
                     const Tensors& weights, const Tensors& biases, const Numbers& layers,
                     StringHandle family, StringHandle activation, StringHandle last_activation, int64_t mode,
                     const std::optional<Tensor>& per_sample_weights, const std::optional<Numbers>& features,
                     std::optional<int64_t> num_features);
Tensor packed_dhe_bag_multi(const Tensor& indices, const Tensor& offsets, const Tensors& coefficients,
                            const Tensors& weights, const Tensors& biases, const Numbers& layers,
                            StringHandle family, StringHandle activation, StringHandle last_activation,
                            const std::vector<StringHandle>& precisions, int64_t mode,
                            const std::optional<Tensor>& per_sample_weights,
                            const std::optional<Numbers>& features, std::optional<int64_t> num_features);

// dense.cpp
Tensor mlp(const Tensor& input, const Tensors& weights, const Tensors& biases, StringHandle activation,
           StringHandle last_activation);
Tensor dot_interaction(const Tensor& vectors, bool self_interaction, const std::optional<Tensor>& first);

}  // namespace mprec::stable
