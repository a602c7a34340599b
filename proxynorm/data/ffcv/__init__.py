"""FFCV's .beton files: format, writer, and the decoder that reads them."""
