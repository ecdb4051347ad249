# cmake -DFROM=aten_ops.txt -DTO=op_table_text.inc -P embed_op_table.cmake: a file as C++ string literals, one per line.
file(STRINGS "${FROM}" lines)
set(text "")
foreach(line IN LISTS lines)
  string(REPLACE "\\" "\\\\" line "${line}")
  string(REPLACE "\"" "\\\"" line "${line}")
  string(APPEND text "\"${line}\\n\"\n")
endforeach()
file(WRITE "${TO}" "${text}")
