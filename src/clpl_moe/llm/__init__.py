"""Asking a language model, for the commands that do: servers and local models, the journal, prompts, checks of answers."""
