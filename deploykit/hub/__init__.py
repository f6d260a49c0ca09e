"""The hub: lowering to float ONNX, quantizing it once per QuantSpec, and running it in torch with gradients."""
