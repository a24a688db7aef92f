// Bags of rows of tables.
#include <utility>
#include <vector>

#include "bags/served.h"
#include "embedding_bag/embedding_bag.h"
#include "rows/formats.h"
#include "torch_stable/bags.h"
#include "torch_stable/operators.h"

namespace mprec::stable {
namespace {

Format plain_format(ScalarType type) {
  return type == ScalarType::Half ? Format::f16 : type == ScalarType::BFloat16 ? Format::bf16 : Format::f32;
}

int32_t dtype_of(Format format) {
  return format == Format::f16    ? aoti_torch_dtype_float16()
         : format == Format::bf16 ? aoti_torch_dtype_bfloat16()
                                  : aoti_torch_dtype_float32();
}

// Views of tables, and what the kernel takes of them: where results go and which bags are whose is missing
// yet.
struct Tables {
  std::vector<View> views;
  std::vector<PooledTable> tables;

  // Rows [N, columns] of `dim` numbers.
  void add(const View& v, const Name& name, Format format, int64_t dim) {
    if (v.shape[0] > 0 && v.shape[1] > 1 && v.strides[1] != 1)
      throw refusal(name, ": expected rows of adjacent values, got stride ", v.strides[1]);
    PooledTable table{};
    table.rows = v.data;
    table.num_rows = v.shape[0];
    table.dim = dim;
    table.row_bytes = v.strides[0] * v.item_bytes();
    table.format = format;
    views.push_back(v);
    tables.push_back(table);
  }

  // A table of numbers. Those of one call have the dtype of the first.
  void add(const Tensor& weight, const Name& name) {
    const View v = view(weight, name);
    check_ndim(v, name, 2);
    check_floats(v, name);
    if (!views.empty() && v.dtype != views.front().dtype)
      throw refusal(name, ": expected ", dtype_name(views.front().dtype), " as weights[0], got ",
                    dtype_name(v.dtype));
    if (v.dtype == ScalarType::Double)
      throw refusal(name,
                    ": without Python only float32, float16 and bfloat16 are served, got torch.float64");
    add(v, name, plain_format(v.dtype), v.shape[1]);
  }

  // A table of quantised rows, of the format of this code, or of numbers.
  void add(const Tensor& rows, int64_t code, int64_t t) {
    const Name name{"rows", t};
    const View v = view(rows, name);
    const bool bytes = v.dtype == ScalarType::Byte;
    if (v.ndim() != 2 || !(bytes || (is_float(v.dtype) && v.dtype != ScalarType::Double)))
      throw refusal(name, ": expected [N, bytes] of uint8, or [N, D] of float32, float16 or bfloat16, got ",
                    list(v.shape), " of ", dtype_name(v.dtype));
    if (!bytes) return add(v, name, plain_format(v.dtype), v.shape[1]);
    const FormatTraits& format = quantised_format(code, {"bits", t});
    const bool holds_one = v.shape[1] >= format.bytes(0) && format.dim(v.shape[1]) >= 1;
    if (!holds_one) throw refusal(name, ": ", v.shape[1], " bytes hold no row of ", format.name);
    add(v, name, format.format, format.dim(v.shape[1]));
  }

  static const FormatTraits& quantised_format(int64_t code, const Name& name) {
    std::string codes;
    for (int i = 0; i < num_formats; ++i) {
      const FormatTraits& format = traits(static_cast<Format>(i));
      if (!format.quantised) continue;
      if (format.code == code) return format;
      codes += (codes.empty() ? "" : " or ") + std::to_string(format.code);
    }
    throw refusal(name, ": expected ", codes, ", got ", code);
  }
};

// Pooled rows of all tables, side by side, in numbers of one of the plain formats.
Tensor pool(Tables of, const CheckedBags& checked, Format format) {
  std::vector<PooledTable>& tables = of.tables;
  const ServedBags bags(*checked, checked.features());
  int64_t width = 0;
  for (const PooledTable& table : tables) width += table.dim;
  const Matrix out = new_matrix(bags->batch, width, dtype_of(format));
  const int64_t item_bytes = format == Format::f32 ? 4 : 2;
  int64_t column = 0;
  for (size_t t = 0; t < tables.size(); ++t) {
    tables[t].first_bag = bags->first_bag(static_cast<int64_t>(t));
    tables[t].out = reinterpret_cast<float*>(out.data + column * item_bytes);
    tables[t].out_stride = width;
    tables[t].out_format = format;
    column += tables[t].dim;
  }
  tables.emplace_back().first_bag = bags->num_bags();
  bags.run([&] { embedding_bag_forward({*bags, tables.data()}, threads()); },
           [&](size_t t) { return tables[t].num_rows; });
  return out.tensor;
}

}  // namespace

Tensor embedding_bag(const Tensor& weight, const Tensor& indices, const Tensor& offsets, int64_t mode,
                     const std::optional<Tensor>& per_sample_weights, bool include_last_offset,
                     int64_t padding_idx, bool, bool) {
  Tables table;
  table.add(weight, {"weight"});
  const CheckedBags bags(
      {indices, offsets, mode, per_sample_weights, std::nullopt, 1, include_last_offset, padding_idx}, 1,
      table.views[0].dtype, false);
  const Format format = table.tables[0].format;
  return pool(std::move(table), bags, format);
}

Tensor embedding_bag_multi(const Tensors& weights, const Tensor& indices, const Tensor& offsets, int64_t mode,
                           const std::optional<Tensor>& per_sample_weights,
                           const std::optional<Numbers>& features, std::optional<int64_t> num_features,
                           bool) {
  if (weights.empty()) throw refusal("weights: expected at least one table");
  const auto count = static_cast<int64_t>(weights.size());
  Tables tables;
  for (int64_t t = 0; t < count; ++t) tables.add(weights[t], {"weights", t});
  const CheckedBags bags({indices, offsets, mode, per_sample_weights, features, num_features}, count,
                         tables.views[0].dtype, true);
  const Format format = tables.tables[0].format;
  return pool(std::move(tables), bags, format);
}

Tensor quantized_embedding_bag_multi(const Tensors& rows, const Numbers& bits, const Tensor& indices,
                                     const Tensor& offsets, int64_t mode,
                                     const std::optional<Tensor>& per_sample_weights,
                                     const std::optional<Numbers>& features,
                                     std::optional<int64_t> num_features) {
  if (rows.empty() || bits.size() != rows.size())
    throw refusal("rows, bits: expected at least one, of equal number, got ", rows.size(), ", ", bits.size());
  const auto count = static_cast<int64_t>(rows.size());
  Tables tables;
  for (int64_t t = 0; t < count; ++t) tables.add(rows[t], bits[t], t);
  const CheckedBags bags({indices, offsets, mode, per_sample_weights, features, num_features}, count,
                         ScalarType::Float, false);
  return pool(std::move(tables), bags, Format::f32);
}

}  // namespace mprec::stable
