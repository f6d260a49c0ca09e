"""Writing and running .tflite files. `operators.py` is the translation table; start reading there."""
