"""Files made smaller without loss: entropy coders, streams of symbols, weights as sparse codes."""
