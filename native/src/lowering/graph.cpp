#include "graph.hpp"

#include <algorithm>

#include "ops/registry.hpp"

namespace quantflow::lowering {

std::string base_name(const std::string& target) { return target.substr(0, target.find('.')); }

std::string overload_name(const std::string& target) {
    const std::size_t dot = target.find('.');
    return dot == std::string::npos ? std::string() : target.substr(dot + 1);
}

bool Graph::is_output(int value) const {
    return std::find(section_.outputs.begin(), section_.outputs.end(), value) != section_.outputs.end();
}

int Graph::only_user(int index) const {
    const Value& v = value(index);
    return v.users.size() == 1 && !is_output(index) && is_inside(v.users[0]) ? v.users[0] : -1;
}

bool Graph::feeds_conv(int index) const {
    for (int user : value(index).users) {
        const Node& n = node(user);
        if (n.op == Op::conv || n.op == Op::max_pool || n.op == Op::avg_pool) return true;
        if (n.op == Op::quantize && feeds_conv(n.output)) return true;
    }
    return false;
}

StoredAs Graph::stored_as(int index) const {
    const Value& v = value(index);
    if (!v.is_signed) return {DType::u8, *v.q, 0};
    QParams q = *v.q;
    if (stores_unsigned_) {
        q.zero_point += 128;
        q.qmin = 0;
        q.qmax = 255;
        return {DType::u8, q, 128};
    }
    if (v.is_nonnegative) {  // the same integers, without the compensation that s8 x s8 needs
        q.qmin = 0;
        return {DType::u8, q, 0};
    }
    return {DType::s8, q, 0};
}

bool Graph::collect_codes(int index, std::optional<StoredAs>& found) const {
    if (is_output(index)) return false;
    for (int user : value(index).users) {
        const Node& n = node(user);
        if (!is_inside(user)) return false;
        if (n.op == Op::quantize) {
            const StoredAs codes = stored_as(n.output);
            if (found && !(*found == codes)) return false;
            found = codes;
        } else if (role_of(n) == Role::move) {
            if (!collect_codes(n.output, found)) return false;
        } else if (n.op != Op::size) {
            return false;
        }
    }
    return true;
}

Form Graph::form_of(int index) const {
    if (value(index).q) {
        const StoredAs s = stored_as(index);
        return {s.dtype, s.q, false};
    }
    std::optional<StoredAs> codes;
    if (collect_codes(index, codes) && codes) return {codes->dtype, codes->q, true};
    return {};
}

}  // namespace quantflow::lowering
