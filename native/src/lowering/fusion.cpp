#include "fusion.hpp"

#include "ops/registry.hpp"

namespace quantflow::lowering {

int Fusion::absorb_activation(int value, Epilogue& epilogue) {
    const int user = graph_.only_user(value);
    if (graph_.value(value).q || user < 0) return value;
    const Node& n = graph_.node(user);
    if (n.op != Op::aten || n.args.empty() || n.args[0].as<Ref>() == nullptr) return value;
    const auto found = activation_of(n);
    if (!found) return value;
    epilogue = *found;
    absorbed_[static_cast<std::size_t>(user)] = true;
    return n.output;
}

std::optional<TwoTerms> Fusion::absorb_two_terms(int value) {
    const Value& v = graph_.value(value);
    if (!takes_terms_ || v.q || graph_.is_output(value) || v.users.size() != 2 || !graph_.is_inside(v.users[0]) ||
        !graph_.is_inside(v.users[1]))
        return std::nullopt;
    const Node& quantize = graph_.node(v.users[0]);
    const Node& sub = graph_.node(v.users[1]);
    if (quantize.op != Op::quantize || role_of(sub) != Role::subtract || overload_name(sub.target) != "Tensor" ||
        sub.args.size() != 2 || !sub.kwargs.empty())
        return std::nullopt;
    const auto *from = sub.args[0].as<Ref>(), *what = sub.args[1].as<Ref>();
    if (from == nullptr || what == nullptr || from->value != value) return std::nullopt;
    const int maker = graph_.value(what->value).producer, last = graph_.only_user(sub.output);
    if (maker < 0 || last < 0) return std::nullopt;
    const Node& dequantize = graph_.node(maker);
    const Node& rest = graph_.node(last);
    const auto* codes = dequantize.args.empty() ? nullptr : dequantize.args[0].as<Ref>();
    if (dequantize.op != Op::dequantize || codes == nullptr || codes->value != quantize.output ||
        rest.op != Op::quantize)
        return std::nullopt;
    absorb(std::initializer_list<int>{v.users[0], v.users[1], last});
    return TwoTerms{quantize.output, rest.output, graph_.stored_as(quantize.output), graph_.stored_as(rest.output)};
}

std::optional<Sum> Fusion::sum_after(int value) const {
    const int user = graph_.only_user(value);
    if (!takes_terms_ || graph_.value(value).q || user < 0) return std::nullopt;
    const Node& n = graph_.node(user);
    if (n.op != Op::aten || n.target != "add.Tensor" || n.args.size() != 2 || !n.kwargs.empty()) return std::nullopt;
    const auto *a = n.args[0].as<Ref>(), *b = n.args[1].as<Ref>();
    if (a == nullptr || b == nullptr || (a->value == value) == (b->value == value)) return std::nullopt;
    return Sum{user, a->value == value ? b->value : a->value, n.output};
}

int Fusion::absorb_codes(int value) {
    if (!takes_terms_) return -1;
    for (int user : graph_.value(value).users) {
        if (!graph_.is_inside(user) || is_absorbed(user)) continue;
        const Node& n = graph_.node(user);
        if (n.op != Op::quantize || graph_.feeds_conv(n.output)) continue;
        absorb(std::initializer_list<int>{user});
        return n.output;
    }
    return -1;
}

bool Fusion::leave_border(int value, const Dims& inside, const Dims& before, const Dims& padded) {
    int read = value, user = graph_.only_user(value);
    if (user >= 0 && graph_.node(user).op == Op::quantize) {
        read = graph_.node(user).output;
        user = graph_.only_user(read);
    }
    if (user < 0) return false;
    const Node& n = graph_.node(user);
    if (n.op != Op::conv || inside.size() != n.geometry.padding.size() + 2) return false;
    const auto is_read = [&](std::size_t i) {
        const Ref* ref = n.args[i].as<Ref>();
        return ref != nullptr && ref->value == read;
    };
    if (!is_read(0) || is_read(1)) return false;
    if (padded[0] != inside[0] || padded[1] != inside[1]) return false;
    Border border;
    for (std::size_t i = 2; i < inside.size(); ++i) {
        border.before.push_back(before[i]);
        border.after.push_back(padded[i] - inside[i] - before[i]);
        // More zeros than the kernel reaches over are no usual padding.
        const std::int64_t reach = n.geometry.dilation[i - 2] * (n.weights.dims[i] - 1);
        if (inside[i] == 0 || before[i] + n.geometry.padding[i - 2] > reach ||
            border.after.back() + n.geometry.padding[i - 2] > reach)
            return false;
    }
    borders_[read] = border;
    return true;
}

const Border* Fusion::border_of(int value) const {
    const auto it = borders_.find(value);
    return it == borders_.end() ? nullptr : &it->second;
}

bool Fusion::is_added_next(int node) const {
    const int next = node + 1;
    const Node& n = graph_.node(node);
    if (!takes_terms_ || n.epilogue.kind != Activation::none || graph_.only_user(n.output) != next ||
        graph_.value(n.output).q)
        return false;
    const Node& u = graph_.node(next);
    if (u.op != n.op || u.weights.dims != n.weights.dims) return false;
    const auto *x = n.args[0].as<Ref>(), *other = u.args[0].as<Ref>(), *added = u.args[1].as<Ref>();
    if (x == nullptr || other == nullptr || added == nullptr || added->value != n.output) return false;
    const Border *border = border_of(x->value), *other_border = border_of(other->value);
    if ((border == nullptr) != (other_border == nullptr) || (border != nullptr && !(*border == *other_border)))
        return false;
    return u.geometry.stride == n.geometry.stride && u.geometry.padding == n.geometry.padding &&
           u.geometry.dilation == n.geometry.dilation && u.geometry.groups == n.geometry.groups;
}

}  // namespace quantflow::lowering
