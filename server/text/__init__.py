"""The text around a model: chat template, tokens, tool calls, grammars."""
