// What a parser of an untrusted JSON text refuses at once.
#pragma once

#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "program.hpp"

namespace quantflow {

// A parser's callback: nesting beyond `most`, because the parser does not recurse, but what reads its result does; and a
// key that is given twice, because of two equal ones each reader might take another. `text` names what is parsed.
inline auto json_guard(const std::string& text, int most) {
    using json = nlohmann::json;
    return [text, most, keys = std::vector<std::set<std::string>>()](int depth, json::parse_event_t event,
                                                                      json& value) mutable {
        if (depth > most) throw Error(text + " is nested too deep");
        if (event == json::parse_event_t::object_start) keys.emplace_back();
        if (event == json::parse_event_t::object_end) keys.pop_back();
        if (event == json::parse_event_t::key && !keys.back().insert(value.get<std::string>()).second)
            throw Error(text + " gives key " + value.dump(-1, ' ', false, json::error_handler_t::replace) + " twice");
        return true;
    };
}

}  // namespace quantflow
