"""A model behind OpenAI's API: two processes, described in docs/serving.md."""
