"""The nouns everybody shares. Imports nothing of ours, and neither torch nor onnx when imported."""
