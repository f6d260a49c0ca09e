"""Files made smaller without loss: the container, packed and read, of files of any runtime."""
