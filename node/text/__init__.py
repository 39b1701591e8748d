"""Text and tokens: tokenizer, detokenisation, tool calls, grammars, sampling defaults."""
