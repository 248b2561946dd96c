"""Queries that a language model writes for passages: prompts, backends, the journal of answers, and what is kept of them."""
