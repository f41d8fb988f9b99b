"""Models as Hugging Face folders describe them: configuration, weights, rotary tables and the one decoder."""
