"""The parts of the TensorRT exporter: shapes, opset, half, lint, golden and the script that runs on the device."""
