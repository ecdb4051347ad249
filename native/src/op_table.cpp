#include "op_table.hpp"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <sstream>
#include <string_view>
#include <unordered_map>

namespace quantflow {
namespace {

// The build embeds the file as it is (embed_op_table.cmake).
const char kText[] =
#include "op_table_text.inc"
    ;

constexpr std::int64_t kMaxSize = std::int64_t{1} << 40;

const std::unordered_map<std::string, Kind> kKinds = {
    {"Tensor", Kind::tensor}, {"Operand", Kind::operand}, {"int", Kind::integer},   {"float", Kind::real},    {"bool", Kind::flag},
    {"Scalar", Kind::number}, {"str", Kind::text},      {"dtype", Kind::dtype},   {"layout", Kind::layout},
    {"device", Kind::device}, {"none", Kind::none},     {"memory_format", Kind::memory_format},
};

struct Lines {
    std::vector<std::string> targets;
    std::unordered_map<std::string, std::string> by_target;
    Lines() {
        std::istringstream text(kText);
        for (std::string line; std::getline(text, line);) {
            if (line.empty() || line[0] == '#') continue;
            targets.push_back(line.substr(0, line.find(' ')));
            by_target.emplace(targets.back(), line);
        }
    }
};
const Lines& lines() {
    static const Lines found;
    return found;
}

// name:type[rule][=], see the table's first lines.
TableArgument parsed(std::string_view word, bool is_keyword) {
    TableArgument a;
    a.is_keyword = is_keyword;
    const auto take = [&word](std::size_t n) {
        const std::string_view front = word.substr(0, n);
        word.remove_prefix(std::min(n, word.size()));
        return std::string(front);
    };
    const auto takes = [&](std::string_view front) {
        if (word.substr(0, front.size()) != front) return false;
        word.remove_prefix(front.size());
        return true;
    };
    a.name = take(word.find(':'));
    takes(":");
    std::size_t letters = 0;
    while (letters < word.size() && (std::isalpha(static_cast<unsigned char>(word[letters])) || word[letters] == '_'))
        ++letters;
    a.kind = kKinds.at(take(letters));
    const bool none_before = takes("?");
    if (takes("[")) {
        a.is_list = true;
        a.takes_none_inside = none_before;
        const std::string length = take(word.find(']'));
        a.length = static_cast<std::size_t>(std::atoi(length.c_str()));
        a.takes_single = a.length > 0 && length.back() != '!' && a.kind != Kind::tensor;
        takes("]");
        a.takes_none = takes("?");
    } else {
        a.takes_none = none_before || a.kind == Kind::none;
    }
    if (!word.empty() && word.back() == '=') {
        a.is_optional = true;
        word.remove_suffix(1);
    }
    if (takes(">=")) {
        a.is_bounded = true;
        a.low = std::strtoll(std::string(word).c_str(), nullptr, 10);
        a.high = kMaxSize;
    } else if (const auto dots = word.find(".."); dots != std::string_view::npos) {
        a.is_bounded = true;
        a.low = std::strtoll(std::string(word.substr(0, dots)).c_str(), nullptr, 10);
        a.high = std::strtoll(std::string(word.substr(dots + 2)).c_str(), nullptr, 10);
    } else {
        a.is_axis = takes("@");
    }
    return a;
}

bool is_of(Kind kind, const Arg& value) {
    const auto word = [&](const char* name) {
        const Word* found = value.as<Word>();
        return found != nullptr && found->kind == name;
    };
    const auto* whole = value.as<std::int64_t>();
    const bool is_number = whole != nullptr || value.as<double>() != nullptr || value.as<bool>() != nullptr;
    switch (kind) {
        case Kind::tensor: return value.as<TensorRef>() != nullptr;
        case Kind::operand: return value.as<TensorRef>() != nullptr || is_number;
        case Kind::integer: return whole != nullptr || value.as<bool>() != nullptr;
        case Kind::real:
        case Kind::number: return is_number;
        case Kind::flag: return value.as<bool>() != nullptr || (whole != nullptr && (*whole == 0 || *whole == 1));
        case Kind::text: return word("str");
        case Kind::dtype: return word("dtype");
        case Kind::layout: return word("layout");
        case Kind::device: return word("device");
        case Kind::memory_format: return word("memory_format");
        case Kind::none: return false;
    }
    return false;
}

void check_one(const TableArgument& a, const Arg& value, const std::string& where) {
    if (!is_of(a.kind, value)) throw Error(where + " is of another type");
    if (const auto* flag = value.as<bool>(); flag != nullptr && a.is_bounded && (*flag < a.low || *flag > a.high))
        throw Error(where + " is " + (*flag ? "true" : "false"));
    const auto* whole = value.as<std::int64_t>();
    if (whole != nullptr && a.is_bounded && (*whole < a.low || *whole > a.high))
        throw Error(where + " is " + std::to_string(*whole) + ", must be in [" + std::to_string(a.low) + ", " +
                    std::to_string(a.high) + "]");
}

void check_value(const TableArgument& a, const Arg& value, const std::string& where) {
    if (value.is_none()) {
        if (!a.takes_none) throw Error(where + " is None");
        return;
    }
    if (value.as<Ref>() != nullptr) return;
    const Args* items = value.as<Args>();
    if (items == nullptr) {
        if (a.is_list && !a.takes_single) throw Error(where + " is no list");
        return check_one(a, value, where);
    }
    if (!a.is_list) throw Error(where + " is a list");
    if (items->size() > kMaxItems) throw Error(where + " has " + std::to_string(items->size()) + " entries");
    if (a.length > 1 && items->size() > 1 && items->size() != a.length)
        throw Error(where + " has " + std::to_string(items->size()) + " entries, must have " +
                    std::to_string(a.length) + ", or one for all");
    for (const Arg& item : *items) {
        if (item.is_none() ? !a.takes_none_inside : false) throw Error(where + " holds None");
        if (!item.is_none() && item.as<Ref>() == nullptr) check_one(a, item, where);
    }
}

}  // namespace

const std::vector<std::string>& table_targets() { return lines().targets; }

const TableRow* table_row(const std::string& target) {
    static std::mutex mutex;
    static std::unordered_map<std::string, TableRow> rows;
    const std::lock_guard<std::mutex> lock(mutex);
    if (const auto made = rows.find(target); made != rows.end()) return &made->second;
    const auto line = lines().by_target.find(target);
    if (line == lines().by_target.end()) return nullptr;
    TableRow row;
    row.target = target;
    std::istringstream words(line->second);
    std::string word;
    words >> word;
    for (bool is_keyword = false; words >> word && word != "->";) {
        if (word == "*")
            is_keyword = true;
        else
            row.arguments.push_back(parsed(word, is_keyword));
    }
    return &rows.emplace(target, std::move(row)).first->second;
}

void check_arguments(const TableRow& row, const Node& n, const std::string& where) {
    std::size_t given = 0;
    for (const TableArgument& a : row.arguments) {
        const std::string at = where + ": argument '" + a.name + "' of " + row.target;
        const auto keyword = n.kwargs.find(a.name);
        const bool by_position = !a.is_keyword && given < n.args.size(), by_name = keyword != n.kwargs.end();
        if (by_position && by_name) throw Error(at + " is given twice");
        if (!by_position && !by_name && !a.is_optional) throw Error(at + " is missing");
        if (by_position) check_value(a, n.args[given++], at);
        if (by_name) check_value(a, keyword->second, at);
    }
    if (given < n.args.size())
        throw Error(where + ": " + row.target + " takes " + std::to_string(given) + " arguments by position, has " +
                    std::to_string(n.args.size()));
    for (const auto& [name, value] : n.kwargs)
        if (std::none_of(row.arguments.begin(), row.arguments.end(),
                         [key = &name](const TableArgument& a) { return a.name == *key; }))
            throw Error(where + ": " + row.target + " has no argument '" + name + "'");
}

}  // namespace quantflow
