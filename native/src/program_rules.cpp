#include "program_rules.hpp"

namespace quantflow {

void fail(const std::string& where, const std::string& what) {
    throw Error("program.json: " + (where.empty() ? what : where + ": " + what));
}

void check_operands(const Program& program, const Node& node, const std::string& where) {
    const auto value_of = [&](const Arg& arg) -> const Value* {
        const Ref* ref = arg.as<Ref>();
        return ref == nullptr ? nullptr : &program.values[static_cast<std::size_t>(ref->value)];
    };
    const Value& out = program.values[static_cast<std::size_t>(node.output)];
    auto codes = [&](std::size_t i) -> const Value& {
        const Value* value = i < node.args.size() ? value_of(node.args[i]) : nullptr;
        if (value == nullptr || !value->q) fail(where, "argument " + std::to_string(i) + " holds no int8 codes");
        return *value;
    };
    auto arity = [&](std::size_t n) {
        if (node.args.size() != n)
            fail(where, "takes " + std::to_string(n) + " arguments, has " + std::to_string(node.args.size()));
    };
    auto shares = [&](const Value& in) {
        if (!out.q || !(*out.q == *in.q) || out.is_signed != in.is_signed)
            fail(where, "its output and its inputs must share one scale and zero point");
    };
    switch (node.op) {
        case Op::quantize:
            arity(1);
            if (!out.q) fail(where, "its output has no scale and zero_point");
            if (value_of(node.args[0]) == nullptr || value_of(node.args[0])->q)
                fail(where, "quantize reads a value that is not float");
            break;
        case Op::dequantize:
            arity(1);
            codes(0);
            if (out.q) fail(where, "its output can't hold int8 codes");
            break;
        case Op::conv:
        case Op::linear:
            arity(2);
            codes(0);
            if (!node.args[1].is_none() && value_of(node.args[1]) == nullptr) fail(where, "its residual is no value");
            break;
        case Op::matmul:
        case Op::add:
        case Op::mul:
            arity(2);
            codes(0);
            codes(1);
            break;
        case Op::clamp: {
            arity(1);
            shares(codes(0));
            if (node.low < out.q->qmin || node.high > out.q->qmax)
                fail(where, "low and high are not codes of its output");
            break;
        }
        case Op::max_pool: shares(codes(0)); break;
        case Op::avg_pool: codes(0); break;
        case Op::shape: {
            const Value* in = node.args.empty() ? nullptr : value_of(node.args[0]);
            if (in == nullptr) fail(where, "has no operand");
            shares(codes(0));
            break;
        }
        case Op::cat: {
            const Args* items = node.args.empty() ? nullptr : node.args[0].as<Args>();
            if (items == nullptr || items->empty()) fail(where, "has no operands");
            for (const Arg& item : *items) {
                const Value* in = value_of(item);
                if (in == nullptr || !in->q) fail(where, "an operand holds no int8 codes");
                shares(*in);
            }
            break;
        }
        case Op::recurrence:
            arity(3);
            if (out.q) fail(where, "its output can't hold int8 codes");
            for (const Arg& arg : node.args)
                if (const Value* in = value_of(arg); in != nullptr && in->q) fail(where, "reads int8 codes");
            if (node.args[0].as<Ref>() == nullptr) fail(where, "has no gates");
            break;
        case Op::aten:
            if (out.q) fail(where, "its output can't hold int8 codes");
            if (node.target.empty()) fail(where, "names no op");
            break;
        case Op::size:
            if (out.q) fail(where, "its output can't hold int8 codes");
            break;
    }
}

}  // namespace quantflow
