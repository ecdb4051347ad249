"""An int8 program in formats of others: ONNX with QuantizeLinear and DequantizeLinear.

expressible   the program in the forms that QDQ has
onnx_writer   names, constants and sizes of an ONNX graph
onnx_layers   int8 ops
onnx_aten     float ops
onnx_check    onnxruntime's output beside the reference's
"""

from quantflow.exchange.onnx_file import OnnxExport, write_onnx

__all__ = ["OnnxExport", "write_onnx"]
