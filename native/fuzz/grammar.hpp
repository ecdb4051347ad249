// Programs of the table's grammar, chosen byte by byte: each node is an op with arguments that fit what came before it, or
// nearly so. What doesn't fit is mostly left out again, so that programs grow long and still compute something.
#pragma once

#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "../src/lower.hpp"
#include "../src/op_table.hpp"

namespace quantflow::fuzz {

class Choices {
public:
    Choices(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}
    std::size_t next(std::size_t count) {
        if (count == 0) return 0;
        std::size_t value = 0;
        for (int i = 0; i < (count > 256 ? 2 : 1); ++i) value = value << 8 | (at_ < size_ ? data_[at_++] : 0);
        return value % count;
    }
    bool one_in(std::size_t count) { return next(count) == count - 1; }
    bool is_over() const { return at_ >= size_; }

private:
    const std::uint8_t* data_;
    std::size_t size_, at_ = 0;
};

class Grammar {
public:
    using Dims = std::vector<std::int64_t>;

    Grammar(Choices& choices, Backend& backend);
    // program.json; its inputs, and the tensors that it names. They live as long as this does.
    std::string text() const;
    const std::vector<InputForm>& inputs() const { return inputs_; }
    const TensorTable& tensors() const { return tensors_; }

private:
    struct Known {
        std::string name;
        DType dtype = DType::f32;
        Dims dims;
        std::string codes;  // scale, zero point and dtype of codes, as they are written; "": none
        bool is_number = false, is_list = false;
    };

    Choices& c_;
    Backend& backend_;
    std::vector<InputForm> inputs_;
    std::string inputs_text_;
    std::vector<Known> known_;
    std::vector<std::string> nodes_, coded_;
    TensorTable tensors_;
    std::deque<std::vector<std::byte>> memory_;

    bool grow();
    void grow_by_pattern();
    bool keep(const std::string& node, const std::string& output, const std::string& codes);
    std::string next_name() const { return "v" + std::to_string(nodes_.size()); }
    std::string node_of_op(const std::string& output, std::string& codes);
    std::string node_of_codes(const std::string& output, std::string& codes);
    std::string linear(const std::string& op, const Known& x, const std::string& output, std::string& codes);
    std::string recurrence(const Known& gates, const std::string& output);
    std::string call(const std::string& op, const TableRow&, const Known& self, const std::string& output);
    std::string argument(const TableArgument&, const TableRow&, const Known& self, bool is_self);
    std::string of_kind(const TableArgument&, const TableRow&, const Known& self, bool is_self);
    std::string operand(const TableArgument&, const TableRow&, const Known& self);
    std::string integers(const TableArgument&, const TableRow&, const Known& self);
    std::string integer(const TableArgument&, const Known& self);
    Dims weight_of(const std::string& target, const Known& self);
    std::string codes();
    std::string epilogue();
    std::string tensor(DType, Dims);
    const Known& pick();
    const Known* pick_of(DType, bool is_coded);
    bool sized_like(const Known& a, const Known& b) const { return a.dims == b.dims && a.dtype == b.dtype; }
};

}  // namespace quantflow::fuzz
